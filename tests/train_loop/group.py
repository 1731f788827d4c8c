"""Runs on several gloo workers, each a process, without Ray: `python -m tests.train_loop.group` is one of them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.train_loop.test_resume import Watcher

GROUP_S = 300


def run_group(folder, world_size, runs, prepared, model):
    """Run each (name, job, step to stop at or None) in turn, in `folder`/name, on rows that `prepared` (a data folder) holds."""
    for name, _, _ in runs:
        if not (folder / name / "data").exists():
            shutil.copytree(prepared, folder / name / "data")
    (folder / f"runs-{world_size}.json").write_text(json.dumps(runs))
    store = Path(tempfile.mkdtemp(dir=folder)) / "store"
    command = [sys.executable, "-m", "tests.train_loop.group", str(folder), str(world_size), str(model), str(store)]
    workers = [subprocess.Popen([*command, str(rank)], env=os.environ | {"OMP_NUM_THREADS": "1"}) for rank in range(world_size)]
    try:
        assert [worker.wait(GROUP_S) for worker in workers] == [0] * world_size
    finally:
        for worker in workers:
            worker.kill()


def _work(folder, world_size, model, store, rank):
    import torch.distributed as dist
    from pyarrow.fs import LocalFileSystem

    from train_loop.context import LocalContext
    from train_loop.data.shards import PreparedDataset
    from train_loop.loop import run
    from train_loop.spec import JobSpec

    rank, world_size = int(rank), int(world_size)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    for name, job, stop_at in json.loads(Path(folder, f"runs-{world_size}.json").read_text()):
        monitor = Watcher(stop_at if rank == 0 else None)
        scratch = Path(tempfile.mkdtemp(dir=folder))
        ctx = LocalContext(
            model_folder=Path(model),
            storage=LocalFileSystem(),
            run_path=f"{folder}/{name}",
            scratch=scratch,
            monitor=monitor,
            rank=rank,
            world_size=world_size,
            local_world_size=world_size,
        )
        prepared = PreparedDataset.from_json(Path(folder, name, "data/index.json").read_text())
        outcome = run(JobSpec.model_validate(job), prepared, ctx)
        assert outcome.stopped == (stop_at is not None), outcome
    dist.destroy_process_group()


if __name__ == "__main__":
    _work(*sys.argv[1:])
