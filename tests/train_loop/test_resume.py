"""A run that ends at any point goes on as if it hadn't, and only from a checkpoint that is whole."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow.fs import LocalFileSystem

from tests.conftest import TINY
from train_loop.__main__ import Console
from train_loop.checkpoint import Checkpoints
from train_loop.context import LocalContext
from train_loop.data.shards import PreparedDataset
from train_loop.errors import Cause, RunFault, Stopped
from train_loop.loop import run
from train_loop.spec import JobSpec
from train_loop.storage import write_json

HP = "train_config.hyperparameters"
STEPS = 5


class Watcher(Console):
    """A monitor that remembers, asks to stop once a step has been reported, or breaks there."""

    def __init__(self, stop_at=None, break_at=None, superseded_at=10**9):
        super().__init__()
        self.stop_at, self.break_at, self.superseded_at, self.seen = stop_at, break_at, superseded_at, -1
        self.events, self.phases, self.points = [], [], {}

    def on_phase(self, name):
        self.phases.append(name)

    def on_event(self, kind, message):
        self.events.append((kind, message))

    def on_progress(self, progress):
        self.seen = progress["step"]
        self.points |= {point["step"]: point for point in progress["points"]}
        if self.seen == self.break_at:
            raise KeyError("this process dies here")

    def stop_requested(self):
        return self.stop_at is not None and self.seen >= self.stop_at

    def is_current(self):
        return self.seen < self.superseded_at

    def said(self, kind):
        return [message for k, message in self.events if k == kind]


def adapter(folder):
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


def curve(folder):
    """metrics.jsonl without what a clock says."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_second")} for line in lines]


def short(local_job, changes=None):
    base = {f"{HP}.max_steps": STEPS, f"{HP}.save_steps": 2, f"{HP}.eval_steps": 3, f"{HP}.logging_steps": 3}
    return local_job(base | {"train_config.adapter_config.dropout": 0.2} | (changes or {}))


@pytest.mark.parametrize(("lazy", "workers", "steps"), [(True, 0, 12), (True, 1, STEPS), (False, 1, STEPS)])
def test_stopped_at_every_step_a_run_ends_with_the_same_bytes(local_job, tmp_path, launch, lazy, workers, steps):
    changes = {"dataset_config.preprocessing.lazy_tokenize": lazy, f"{HP}.dataloader_num_workers": workers}
    job = short(local_job, changes | {f"{HP}.max_steps": steps})
    launch(job, "whole")
    for step in range(steps):
        monitor = Watcher(stop_at=step)
        with pytest.raises(Stopped):
            launch(job, "cut", monitor)
        assert monitor.said("resumed") == ([f"resumed from the checkpoint of step {step - 1}"] if step else [])
        assert not (tmp_path / "cut/manifest.json").exists()
    manifest = launch(job, "cut")
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")
    assert manifest["metrics"]["best"] == json.loads((tmp_path / "whole/manifest.json").read_text())["metrics"]["best"]


def test_broken_at_every_step_a_run_ends_with_the_same_bytes(local_job, tmp_path, launch):
    job = short(local_job)
    launch(job, "whole")
    for step in range(STEPS + 1):
        name = f"cut-{step}"
        with pytest.raises(RunFault):
            launch(job, name, Watcher(break_at=step))
        monitor = Watcher()
        launch(job, name, monitor)
        saved = max((s for s in (2, 4) if s < step), default=None)
        assert monitor.said("resumed") == ([f"resumed from the checkpoint of step {saved}"] if saved else [])
        assert adapter(tmp_path / name) == adapter(tmp_path / "whole")
        assert curve(tmp_path / name) == curve(tmp_path / "whole")
        assert list(monitor.points) == [line["step"] for line in curve(tmp_path / "whole")]  # what got lost is told again


@pytest.mark.parametrize("step", [2, STEPS])
def test_an_attempt_that_another_one_has_superseded_writes_nothing_that_counts(local_job, tmp_path, launch, step):
    job = short(local_job)
    with pytest.raises(RunFault) as caught:
        launch(job, "cut", Watcher(superseded_at=step))
    assert caught.value.cause is Cause.SUPERSEDED
    whole = {p.parent.name for p in (tmp_path / "cut/checkpoints").glob("*/complete.json")}
    assert whole <= {f"step-{s:08d}" for s in (2, 4) if s < step}
    assert not any((tmp_path / "cut" / name).exists() for name in ("adapter", "outcome.json", "manifest.json"))
    launch(job, "cut")
    launch(job, "whole")
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")


def test_every_notice_of_a_preemption_makes_a_checkpoint_and_no_notice_makes_two(local_job, tmp_path, mirror, launch):
    class Noticed(LocalContext):
        def preemption(self):
            return {2: "machine 1 will go", 3: "machine 1 will go", 4: "machines 1 and 2 will go"}.get(self.monitor.seen)

    job = short(local_job, {f"{HP}.save_steps": 100})
    with pytest.raises(Stopped):
        launch(job, "run", Watcher(stop_at=0))
    prepared = PreparedDataset.from_json((tmp_path / "run/data/index.json").read_text())
    monitor = Watcher()
    (tmp_path / "scratch").mkdir()
    ctx = Noticed(mirror / TINY, LocalFileSystem(), str(tmp_path / "run"), tmp_path / "scratch", monitor)
    run(JobSpec.model_validate(job), prepared, ctx)
    assert monitor.said("preempted") == ["machine 1 will go; step 2 is saved", "machines 1 and 2 will go; step 4 is saved"]


def test_a_stop_during_an_evaluation_makes_up_for_it_later(local_job, tmp_path, launch):
    class StopInEvaluation(Watcher):
        def stop_requested(self):
            return self.seen == 3 and self.phases[-1] == "evaluating"

    job = short(local_job)
    launch(job, "whole")
    with pytest.raises(Stopped):
        launch(job, "cut", StopInEvaluation())
    launch(job, "cut")
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def break_newest(folder, how):
    newest = folder / "checkpoints/step-00000004"
    file = newest / "optimizer.pt"
    if how == "a flipped bit":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif how == "a short file":
        file.write_bytes(file.read_bytes()[:100])
    elif how == "a missing file":
        file.unlink()
    elif how == "half a marker":
        marker = newest / "complete.json"
        marker.write_text(marker.read_text()[:50])
    else:
        (newest / "complete.json").unlink()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("a flipped bit", "optimizer.pt isn't what was written"),
        ("a short file", "optimizer.pt has 100 of"),
        ("a missing file", "optimizer.pt is missing"),
        ("half a marker", "complete.json can't be read"),
        ("no marker", "it was cut off while it was written"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_set_aside_and_the_one_before_is_taken(local_job, tmp_path, launch, how, said):
    job = short(local_job)
    launch(job, "whole")
    with pytest.raises(RunFault):
        launch(job, "cut", Watcher(break_at=5))
    break_newest(tmp_path / "cut", how)
    monitor = Watcher(break_at=3)
    with pytest.raises(RunFault):
        launch(job, "cut", monitor)
    (told,) = monitor.said("checkpoint_damaged")
    assert told.startswith(f"the checkpoint of step 4 can't be used ({said}")
    assert told.endswith("): going on from step 2")
    again = Watcher()
    launch(job, "cut", again)
    assert again.said("checkpoint_damaged") == []
    assert again.said("resumed") == ["resumed from the checkpoint of step 2"]
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")


def test_without_any_whole_checkpoint_a_run_starts_again(local_job, tmp_path, launch):
    job = short(local_job)
    launch(job, "whole")
    with pytest.raises(RunFault):
        launch(job, "cut", Watcher(break_at=3))
    (tmp_path / "cut/checkpoints/step-00000002/state.json").write_text("{}")
    monitor = Watcher()
    launch(job, "cut", monitor)
    assert monitor.said("checkpoint_damaged")[0].endswith("starting from the beginning")
    assert monitor.said("resumed") == []
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path, mirror):
    ctx = LocalContext(mirror, LocalFileSystem(), str(tmp_path), tmp_path, Watcher())
    checkpoints = Checkpoints(ctx, keep=2)
    whole, cut_off, set_aside = ["complete.json", "optimizer.pt"], ["optimizer.pt"], ["damaged.json", "optimizer.pt"]
    for step, names in {
        2: whole,
        4: whole,
        5: cut_off,
        6: set_aside,
        8: whole,
        10: whole,
        11: cut_off,
        12: whole,
        14: cut_off,
    }.items():
        for name in names:
            write_json(ctx.storage, f"{tmp_path}/checkpoints/step-{step:08d}/{name}", {})
    checkpoints._prune(12, best=4)
    checkpoints.close()
    # What is newer than step 12 belongs to what came before a fall-back: the run gets there again.
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [f"step-{s:08d}" for s in (4, 10, 12, 14)]


def test_rows_prepared_by_an_earlier_attempt_are_used_again_unless_they_changed(local_job, tmp_path, launch):
    job = short(local_job)
    with pytest.raises(Stopped):
        launch(job, "run", Watcher(stop_at=1))
    shard = tmp_path / "run/data/shard-00000-00000.arrow"
    written = shard.stat().st_mtime_ns
    second = Watcher(stop_at=2)
    with pytest.raises(Stopped):
        launch(job, "run", second)
    assert "prepared by an earlier attempt" in second.said("prepared")[0]
    assert shard.stat().st_mtime_ns == written
    rows = Path(job["dataset_details"]["dataset_path"])
    rows.write_text(rows.read_text().replace("truly", "really"))
    third = Watcher(stop_at=3)
    with pytest.raises(Stopped):
        launch(job, "run", third)
    assert "earlier attempt" not in third.said("prepared")[0]
    assert shard.stat().st_mtime_ns > written


def test_a_run_that_ended_just_before_its_manifest_or_after_it_ends_the_same(local_job, tmp_path, launch):
    job = short(local_job)
    first = launch(job)
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    monitor = Watcher()
    assert launch(job, "run", monitor) == first
    assert monitor.phases == []
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in before} == before

    (tmp_path / "run/manifest.json").unlink()
    again = launch(job)
    assert again["adapter_files"] == first["adapter_files"]
    assert again["metrics"] == first["metrics"]


TWO = """
import dataclasses, json, sys, tempfile
from pathlib import Path

import torch.distributed as dist
from pyarrow.fs import LocalFileSystem

from tests.train_loop.test_resume import Watcher
from train_loop.context import LocalContext
from train_loop.data.shards import PreparedDataset
from train_loop.loop import run
from train_loop.spec import JobSpec

rank, world, job, prepared, folder, model, store = sys.argv[1:]
rank, world = int(rank), int(world)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
for name, stop_at in [("whole", None), ("cut", 3), ("cut", None), ("smaller", 3)]:
    scratch = Path(tempfile.mkdtemp(dir=folder))
    ctx = LocalContext(Path(model), LocalFileSystem(), f"{folder}/{name}", scratch, Watcher(stop_at if rank == 0 else None))
    ctx.rank, ctx.world_size, ctx.local_world_size = rank, world, world
    outcome = run(JobSpec.model_validate_json(job), PreparedDataset.from_json(Path(prepared).read_text()), ctx)
    assert outcome.stopped == (stop_at is not None), outcome
"""


def test_two_workers_resume_exactly_and_one_alone_goes_on_in_the_same_order(local_job, tmp_path, mirror, launch):
    quiet = {"model_details.quantization": None, "train_config.torch_dtype": "float32"}
    job = short(local_job, quiet | {"infra_config": {"gpu_type": "cpu", "gpu_count": 2}, f"{HP}.logging_steps": 1})
    with pytest.raises(Stopped):
        launch(job, "alone", Watcher(stop_at=0))  # for its prepared rows
    for name in ("whole", "cut", "smaller"):
        shutil.copytree(tmp_path / "alone/data", tmp_path / name / "data")
    model = mirror / job["model_details"]["base_model"]
    store, prepared = tmp_path / "store", tmp_path / "alone/data/index.json"
    arguments = [json.dumps(job), str(prepared), str(tmp_path), str(model), str(store)]
    both = [
        subprocess.Popen([sys.executable, "-c", TWO, str(rank), "2", *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})
        for rank in range(2)
    ]
    try:
        assert [process.wait(300) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")

    manifest = launch(job, "smaller")
    assert manifest["world_size"] == 2
    assert manifest["worlds"] == [{"from_step": 1, "world_size": 2}, {"from_step": 4, "world_size": 1}]
    whole, smaller = curve(tmp_path / "whole"), curve(tmp_path / "smaller")
    assert [(p["step"], p.get("tokens"), p.get("learning_rate")) for p in smaller] == [
        (p["step"], p.get("tokens"), p.get("learning_rate")) for p in whole
    ]
    for a, b in zip(smaller, whole, strict=True):
        assert a.get("loss", 0) == pytest.approx(b.get("loss", 0), rel=0.02)
        assert a.get("eval_loss", 0) == pytest.approx(b.get("eval_loss", 0), rel=0.02)
