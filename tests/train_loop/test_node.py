"""What the workers of one machine fetch once."""

from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from tests.train_loop.group import on_workers
from tests.train_loop.runs import Watcher
from train_loop.data.shards import PreparedDataset
from train_loop.errors import Stopped
from train_loop.loop import run
from train_loop.spec import JobSpec


def test_rows_and_checkpoints_are_copied_once_to_a_machine(local_job, launch, tmp_path, mirror):
    changes = {"infra_config": {"gpu_type": "cpu", "gpu_count": 2}, "train_config.hyperparameters.early_stopping_patience": 9}
    job = local_job(changes | {"train_config.hyperparameters.save_steps": 1})
    with pytest.raises(Stopped):
        launch(job, "alone", Watcher(stop_at=2))
    on_workers("tests.train_loop.test_node:go_on", tmp_path, 2, mirror / job["model_details"]["base_model"], job)


def go_on(ctx, job):
    folder = Path(ctx.run_path) / "alone"
    prepared = PreparedDataset.from_json((folder / "data/index.json").read_text())
    # A storage that isn't this machine's disk, as far as anyone can tell, and counts what is read from it.
    ctx.storage, ctx.run_path = Counted(ctx.run_path, LocalFileSystem()), "alone"
    run(JobSpec.model_validate(job), prepared, ctx)
    shards = {f"alone/data/{shard.path}" for shard in prepared.shards}
    assert (ctx.scratch / "data").exists() == (ctx.rank == 0)
    assert set(ctx.storage.read) & shards == (shards if ctx.rank == 0 else set())
    assert any("optimizer.pt" in path for path in ctx.storage.read) == (ctx.rank == 0)
    assert len(ctx.storage.read) == len(set(ctx.storage.read))


class Counted(SubTreeFileSystem):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.read = []

    def open_input_stream(self, path, *arguments, **more):
        self.read.append(path)
        return super().open_input_stream(path, *arguments, **more)

    def open_output_stream(self, path, *arguments, **more):
        self.create_dir(path.rpartition("/")[0], recursive=True)  # an object needs none
        return super().open_output_stream(path, *arguments, **more)
