"""Planned against measured peak memory of one CPU worker: `python -m benchmarks.memory`.

Each case trains two steps in a process of its own, or in a group of them (no Ray, but a worker's allocator), and reads the peak
resident memory of the largest; the plan is made for the same job.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from train_loop.allocator import environment

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TIMEOUT_S = 300
ORG = "0bf00b43-430a-4ca3-a8b3-b13cc8dc6d4f"


def job(
    data: Path,
    bits: int | None,
    checkpointing: bool,
    max_length: int,
    batch: int,
    evaluate: bool,
    trains: str = "lora",
    workers: int = 1,
) -> dict[str, Any]:
    """A case's job; `trains` is lora, dora or full."""
    return {
        "org": ORG,
        "experiment_name": "memory",
        "dataset_config": {
            "preprocessing": {"prompt": {"max_length": max_length}},
            "split": {"type": "random", "ratios": [0.8, 0.2]} if evaluate else {"type": "none"},
        },
        "model_details": {"base_model": SMOLLM2, "quantization": {"quant_bits": bits} if bits else None},
        "train_config": {
            "train_type": "full" if trains == "full" else "lora",
            "adapter_config": {"use_dora": trains == "dora"},
            "hyperparameters": {
                "max_steps": 2,
                "save_steps": 1,  # so that the second step is beside what a checkpoint is written from
                "per_device_train_batch_size": batch,
                "per_device_eval_batch_size": batch,
                "gradient_checkpointing": checkpointing,
                "dataloader_num_workers": 0,
            },
        },
        "dataset_details": {"dataset_path": str(data), "source_type": "local", "ownership": "public"},
        "infra_config": {"gpu_type": "cpu", "gpu_count": workers},
    }


def write_rows(path: Path) -> None:
    """Ten rows of some 3,000 tokens each: every case is filled to its max_length."""
    answer = " ".join(f"The number {i} comes after {i - 1}." for i in range(1, 300))
    row = {"conversations": [{"from": "human", "value": "Count."}, {"from": "gpt", "value": answer}]}
    path.write_text((json.dumps(row) + "\n") * 10)


def measure(spec: dict[str, Any], mirror: str) -> int:
    """Peak resident bytes of a process that runs the job; of its workers, the largest."""
    if spec["infra_config"]["gpu_count"] > 1:
        return measure_group(spec, Path(mirror, SMOLLM2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "job.json")
        path.write_text(json.dumps(spec))
        arguments = [sys.executable, "-m", "benchmarks.memory", "--one", str(path), "--mirror", mirror]
        done = subprocess.run(
            arguments, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment(), timeout=TIMEOUT_S
        )
    return int(done.stdout.splitlines()[-1])


def measure_group(spec: dict[str, Any], model: Path) -> int:
    """The same of several workers, whose rows are prepared before, as a run's are."""
    from benchmarks.sides import Task
    from benchmarks.train import prepare, start

    with tempfile.TemporaryDirectory() as folder:
        prepare(spec, model, Path(folder))
        workers = spec["infra_config"]["gpu_count"]
        said, ended_at = start(Task("ours", "", "packed", spec, model, Path(folder)), workers, TIMEOUT_S)
    if ended_at is not None:
        raise SystemExit(f"two steps take more than {TIMEOUT_S} s")
    return max(line["peak_bytes"] for lines in said for line in lines if "peak_bytes" in line)


def run_one(path: str, mirror: str) -> None:
    from train_loop.__main__ import main

    with tempfile.TemporaryDirectory() as folder:
        assert main([path, "--local", "--storage", folder, "--mirror", mirror]) == 0
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    print(int(found[1]) * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--mirror", default=str(Path.home() / ".tuneyard" / "models"))
    options = parser.parse_args()
    if options.one:
        run_one(options.one, options.mirror)
        return
    from train_loop.model.source import ModelPlaces
    from train_loop.plan import make_plan, this_machine
    from train_loop.spec import JobSpec

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        write_rows(data)
        columns = [
            "trains",
            "workers",
            "quant_bits",
            "checkpointing",
            "max_length",
            "batch",
            "evaluation",
            "planned MB",
            "measured MB",
            "ratio",
        ]
        print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
        adapters = itertools.product((4, None), (True, False), ((512, 1), (512, 4), (1024, 2)), (False, True), [("lora", 1)])
        more = itertools.product((None,), (True, False), [(512, 2)], (False, True), [("full", 1), ("full", 2), ("lora", 2)])
        eight = itertools.product((8,), (True, False), [(512, 2)], (False,), [("lora", 1)])
        dora = itertools.product((4, None), (True, False), [(512, 2)], (False,), [("dora", 1)])
        for bits, checkpointing, (length, batch), evaluate, (trains, workers) in itertools.chain(adapters, more, eight, dora):
            spec = job(data, bits, checkpointing, length, batch, evaluate, trains, workers)
            planned = make_plan(JobSpec.model_validate(spec), ModelPlaces(options.mirror), this_machine())["memory"][
                "total_bytes"
            ]
            measured = measure(spec, options.mirror)
            cells = (
                trains,
                workers,
                bits or "-",
                checkpointing,
                length,
                batch,
                evaluate,
                planned >> 20,
                measured >> 20,
                f"{planned / measured:.2f}",
            )
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
