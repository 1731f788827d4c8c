"""Memory and speed of the preparation of a large dataset: `python -m benchmarks.preparation --gib 5`.

The rows are generated, of many lengths. Each case prepares the same file in a process of its own (no Ray) and reads that one's
peak resident memory. Modes: `lazy` leaves the tokens to the workers, and makes them only of rows whose text doesn't show whether
they are usable; `eager` makes and stores them all; `streaming` stores only where rows are.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ORG = "0bf00b43-430a-4ca3-a8b3-b13cc8dc6d4f"
TINY = "tuneyard/tiny-random-llama"
SUFFIXES = {"jsonl": ".jsonl", "jsonl.gz": ".jsonl.gz", "json": ".json"}
MODES = {"lazy": {"lazy_tokenize": True}, "eager": {"lazy_tokenize": False}, "streaming": {"streaming": True}}


def rows(num_bytes: int) -> Iterator[bytes]:
    """Rows of some hundred bytes to 20 kB, a bad one now and then, until there are `num_bytes`."""
    drawn = random.Random(0)
    written = number = 0
    while written < num_bytes:
        number += 1
        answer = "word " * int(drawn.lognormvariate(5, 1.2))
        turns = [{"from": "human", "value": f"Tell me about {number}."}, {"from": "gpt", "value": answer[:20_000] or "x"}]
        row = json.dumps({"conversations": turns if number % 5000 else []}).encode()
        written += len(row) + 1
        yield row


def write(path: Path, kind: str, num_bytes: int) -> int:
    """Write the rows as a file of this kind; its size in bytes, uncompressed."""
    size = 0
    with gzip.open(path, "wb", 1) if kind.endswith("gz") else path.open("wb") as out:
        between = b",\n" if kind == "json" else b"\n"
        for number, row in enumerate(rows(num_bytes)):
            lead = b"[" if kind == "json" and number == 0 else between if number else b""
            size += out.write(lead + row)
        size += out.write(b"]" if kind == "json" else b"\n")
    return size


def prepare(path: str, kind: str, mode: str, mirror: str) -> dict[str, Any]:
    """Prepare the file in this process: rows, seconds, peak bytes before and after."""
    from pyarrow.fs import LocalFileSystem

    from train_loop.data.prepare import prepare_local
    from train_loop.data.sources import find_files
    from train_loop.data.tokenize import ChatTokenizer
    from train_loop.model.tokenizer import load_tokenizer
    from train_loop.spec import JobSpec

    job = {
        "org": ORG,
        "experiment_name": "preparation",
        "model_details": {"base_model": TINY},
        "dataset_details": {
            "dataset_path": path,
            "dataset_type": kind.partition(".")[0],
            "source_type": "local",
            "ownership": "public",
        },
        "dataset_config": {"preprocessing": MODES[mode]},
        "train_config": {"hyperparameters": {"max_steps": 1}},
        "infra_config": {"gpu_type": "cpu"},
    }
    spec, local = JobSpec.model_validate(job), LocalFileSystem()
    chat = ChatTokenizer.of(spec, load_tokenizer(Path(mirror, TINY)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as run:
        prepared = prepare_local(spec, local, find_files(spec, local), local, run, chat)
    return {
        "rows": prepared.num_rows,
        "rejected": prepared.num_rejected,
        "seconds": time.monotonic() - started,
        "before_bytes": before,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the dataset, uncompressed")
    parser.add_argument("--kinds", nargs="*", default=list(SUFFIXES), choices=list(SUFFIXES))
    parser.add_argument("--modes", nargs="*", default=["lazy"], choices=list(MODES))
    parser.add_argument("--folder", help="where the files go; default a temporary folder")
    parser.add_argument("--mirror", default=str(Path.home() / ".tuneyard/models"), help="of the model that has the tokenizer")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(prepare(*args.child)))
        return
    print(f"{'kind':<10} {'mode':<10} {'GiB':>6} {'rows':>10} {'rejected':>9} {'MiB/s':>7} {'peak MiB':>9} {'imports':>8}")
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            path = Path(folder, f"rows{SUFFIXES[kind]}")
            size = write(path, kind, int(args.gib * 2**30))
            for mode in args.modes:
                command = [sys.executable, "-m", "benchmarks.preparation", "--child", str(path), kind, mode, args.mirror]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                peak, before = found["peak_bytes"] / 2**20, found["before_bytes"] / 2**20
                counts = f"{found['rows']:>10} {found['rejected']:>9} {size / 2**20 / found['seconds']:>7.0f}"
                print(f"{kind:<10} {mode:<10} {size / 2**30:>6.2f} {counts} {peak:>9.0f} {before:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
