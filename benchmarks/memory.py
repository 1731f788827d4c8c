"""Planned against measured peak memory of one CPU worker: `python -m benchmarks.memory`.

Each case trains two steps in a process of its own, or in a group of them (no Ray, but a worker's allocator), and reads the peak
resident memory of the largest; the plan is made for the same job.
"""

from __future__ import annotations

import argparse
import contextlib
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
    train_type: str = "lora",
    workers: int = 1,
) -> dict[str, Any]:
    return {
        "org": ORG,
        "experiment_name": "memory",
        "dataset_config": {
            "preprocessing": {"prompt": {"max_length": max_length}},
            "split": {"type": "random", "ratios": [0.8, 0.2]} if evaluate else {"type": "none"},
        },
        "model_details": {"base_model": SMOLLM2, "quantization": {"quant_bits": bits} if bits else None},
        "train_config": {
            "train_type": train_type,
            "hyperparameters": {
                "max_steps": 2,
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
    workers = spec["infra_config"]["gpu_count"]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as running:
        path = Path(folder, "job.json")
        path.write_text(json.dumps(spec))
        if workers > 1:
            prepare(path, mirror)
        command = [sys.executable, "-m", "benchmarks.memory", "--one", str(path), "--mirror", mirror]
        processes = [
            running.enter_context(
                subprocess.Popen(
                    [*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True, env=os.environ | environment()
                )
            )
            for rank in range(workers)
        ]
        told = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * workers
    return max(int(lines.splitlines()[-1]) for lines in told)


def prepare(path: Path, mirror: str) -> None:
    """Prepare the job's rows beside it, as a group of workers finds them."""
    from pyarrow.fs import LocalFileSystem

    from train_loop.data.prepare import prepare_local
    from train_loop.data.sources import find_files
    from train_loop.data.tokenize import ChatTokenizer
    from train_loop.model.load import load_tokenizer
    from train_loop.model.source import ModelPlaces, model_folder
    from train_loop.spec import JobSpec

    spec, local = JobSpec.model_validate_json(path.read_bytes()), LocalFileSystem()
    chat = ChatTokenizer.of(spec, load_tokenizer(model_folder(spec.model_details, ModelPlaces(mirror))))
    prepare_local(spec, local, find_files(spec, local), local, str(path.parent), chat)


def train_in_group(path: Path, mirror: str, rank: int) -> None:
    """One worker's part of the prepared job."""
    import torch.distributed as dist
    from pyarrow.fs import LocalFileSystem

    from train_loop.__main__ import Console
    from train_loop.context import LocalContext
    from train_loop.data.shards import PreparedDataset
    from train_loop.loop import run
    from train_loop.model.source import ModelPlaces, model_folder
    from train_loop.spec import JobSpec

    spec = JobSpec.model_validate_json(path.read_bytes())
    workers = spec.infra_config.num_workers
    dist.init_process_group("gloo", init_method=f"file://{path.parent}/store", rank=rank, world_size=workers)
    with tempfile.TemporaryDirectory() as scratch:
        ctx = LocalContext(
            model_folder=model_folder(spec.model_details, ModelPlaces(mirror)),
            storage=LocalFileSystem(),
            run_path=str(path.parent),
            scratch=Path(scratch),
            monitor=Console(),
            rank=rank,
            world_size=workers,
            local_rank=rank,
            local_world_size=workers,
        )
        run(spec, PreparedDataset.from_json((path.parent / "data/index.json").read_text()), ctx)
    dist.destroy_process_group()


def run_one(path: str, mirror: str, rank: int) -> None:
    from train_loop.__main__ import main

    if json.loads(Path(path).read_text())["infra_config"]["gpu_count"] > 1:
        train_in_group(Path(path), mirror, rank)
    else:
        with tempfile.TemporaryDirectory() as folder:
            assert main([path, "--local", "--storage", folder, "--mirror", mirror]) == 0
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    print(int(found[1]) * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--mirror", default=str(Path.home() / ".tuneyard" / "models"))
    options = parser.parse_args()
    if options.one:
        run_one(options.one, options.mirror, options.rank)
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
        for bits, checkpointing, (length, batch), evaluate, (trains, workers) in itertools.chain(adapters, more, eight):
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
