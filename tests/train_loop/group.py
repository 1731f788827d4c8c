"""What runs on several gloo workers, each a process, without Ray: `python -m tests.train_loop.group` is one of them."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.train_loop.runs import Watcher

GROUP_S = 300


def run_group(folder, world_size, runs, prepared, model):
    """Run each (name, job, step to stop at or None) in turn, in `folder`/name, on rows that `prepared` (a data folder) holds."""
    for name, _, _ in runs:
        if not (folder / name / "data").exists():
            shutil.copytree(prepared, folder / name / "data")
    on_workers("tests.train_loop.group:run_all", folder, world_size, model, runs)


def on_workers(function, folder, world_size, model, argument):
    """Have `module:function` called on each worker, with its context and the argument, which JSON can hold."""
    store = Path(tempfile.mkdtemp(dir=folder)) / "store"
    (store.parent / "argument.json").write_text(json.dumps(argument))
    command = [sys.executable, "-m", "tests.train_loop.group", function, str(folder), str(world_size), str(model), str(store)]
    workers = [subprocess.Popen([*command, str(rank)], env=os.environ | {"OMP_NUM_THREADS": "1"}) for rank in range(world_size)]
    deadline = time.monotonic() + GROUP_S
    try:
        # One that fails leaves the others waiting for it.
        while any(w.poll() is None for w in workers) and not any(w.poll() for w in workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [worker.poll() for worker in workers] == [0] * world_size
    finally:
        for worker in workers:
            worker.kill()


def run_all(ctx, runs):
    from train_loop.data.shards import PreparedDataset
    from train_loop.loop import run
    from train_loop.spec import JobSpec

    folder = Path(ctx.run_path)
    for name, job, stop_at in runs:
        monitor = Watcher(stop_at if ctx.rank == 0 else None)
        scratch = Path(tempfile.mkdtemp(dir=folder))
        prepared = PreparedDataset.from_json((folder / name / "data/index.json").read_text())
        its = dataclasses.replace(ctx, run_path=str(folder / name), scratch=scratch, monitor=monitor)
        outcome = run(JobSpec.model_validate(job), prepared, its)
        assert outcome.stopped == (stop_at is not None), outcome


def _work(function, folder, world_size, model, store, rank):
    import torch.distributed as dist
    from pyarrow.fs import LocalFileSystem

    from train_loop.context import LocalContext

    rank, world_size = int(rank), int(world_size)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    ctx = LocalContext(
        model_folder=Path(model),
        storage=LocalFileSystem(),
        run_path=folder,
        scratch=Path(tempfile.mkdtemp(dir=folder)),
        monitor=Watcher(),
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
    )
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(ctx, json.loads(Path(store).with_name("argument.json").read_text()))
    dist.destroy_process_group()


if __name__ == "__main__":
    _work(*sys.argv[1:])
