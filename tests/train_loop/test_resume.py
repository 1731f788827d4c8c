"""A run that ends at any point goes on as if it hadn't, and only from a checkpoint that is whole."""

import errno
import json
import threading
import time
from pathlib import Path

import pytest
import torch
from pyarrow.fs import LocalFileSystem

from tests.conftest import TINY
from tests.train_loop.group import run_group
from tests.train_loop.runs import HP, STEPS, Watcher, adapter, curve, short
from train_loop import weights
from train_loop.checkpoint import Checkpoints, _tensors
from train_loop.context import LocalContext
from train_loop.data.shards import PreparedDataset
from train_loop.errors import Cause, RunFault, Stopped
from train_loop.loop import run
from train_loop.snapshot import ALIGNED_BYTES
from train_loop.spec import JobSpec
from train_loop.storage import write_bytes, write_json

HANG_S = 120.0
SAVED = (2, 3, 4)  # of a short job, before its end: every second step, and the best evaluation


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
        saved = max((s for s in SAVED if s < step), default=None)
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
    assert whole <= {f"step-{s:08d}" for s in SAVED if s < step}
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
    assert told.endswith("): going on from step 3")
    again = Watcher()
    launch(job, "cut", again)
    assert again.said("checkpoint_damaged") == []
    assert again.said("resumed") == ["resumed from the checkpoint of step 3"]
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


@pytest.mark.parametrize("eval_steps", [2, 3])  # in the step of a save, and in another
def test_steps_go_on_while_what_was_saved_is_on_its_way_to_storage(local_job, launch, monkeypatch, eval_steps):
    class Steps(Watcher):
        third = threading.Event()

        def on_progress(self, progress):
            super().on_progress(progress)
            if self.seen == 3:
                self.third.set()

    monitor, came = Steps(), []

    def write(storage, path, content):
        if monitor.seen == 2:  # what is written while the second step is the last
            came.append(monitor.third.wait(HANG_S))
        write_bytes(storage, path, content)

    monkeypatch.setattr("train_loop.metric_files.write_bytes", write)
    monkeypatch.setattr("train_loop.storage.write_bytes", write)
    launch(short(local_job, {f"{HP}.eval_steps": eval_steps}), monitor=monitor)
    assert all(came)


@pytest.mark.parametrize("changes", [{}, {f"{HP}.optim": "adamw_8bit", "train_config.adapter_config.r": 64}])
def test_what_is_written_of_a_step_after_the_next_one_is_still_of_that_step(local_job, tmp_path, launch, monkeypatch, changes):
    class Steps(Watcher):
        def on_progress(self, progress):
            if progress["step"] == 3:
                third.set()
            super().on_progress(progress)

    def late(*arguments):
        came.append(third.wait(HANG_S))
        write(*arguments)

    third, came, write = threading.Event(), [], weights.FileFormat.write
    job = short(local_job, changes)
    launch(job, "whole")
    monkeypatch.setattr("train_loop.weights.FileFormat.write", late)
    with pytest.raises(RunFault):
        launch(job, "cut", Steps(break_at=3))
    assert came == [True]
    saved = torch.load(tmp_path / "cut/checkpoints/step-00000002/optimizer.pt")
    moments = list(_tensors(saved))
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in moments}
    assert sum(stored.values()) <= sum(t.nbytes + ALIGNED_BYTES for t in moments)
    monitor = Watcher()
    launch(job, "cut", monitor)
    assert monitor.said("resumed") == ["resumed from the checkpoint of step 2"]
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_what_is_too_large_to_be_copied_is_written_before_the_next_step(local_job, tmp_path, launch, monkeypatch):
    def write(*arguments):
        wrote.append((threading.current_thread() is threading.main_thread(), monitor.seen))
        theirs(*arguments)

    monitor, wrote, theirs = Watcher(break_at=5), [], weights.FileFormat.write
    monkeypatch.setattr("train_loop.checkpoint.affordable", lambda size_bytes, device: False)
    monkeypatch.setattr("train_loop.weights.FileFormat.write", write)
    job = short(local_job)
    with pytest.raises(RunFault):
        launch(job, "cut", monitor)
    assert wrote == [(True, step) for step in SAVED]
    launch(job, "cut")
    launch(job, "whole")
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")


def test_a_disk_that_is_full_behind_the_steps_ends_the_run_at_the_next_save(local_job, tmp_path, launch, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train_loop.weights.FileFormat.write", full)
    monitor = Watcher()
    with pytest.raises(RunFault) as caught:
        launch(short(local_job), "run", monitor)
    assert caught.value.cause is Cause.STORAGE_AWAY
    assert monitor.seen == 3
    assert not list((tmp_path / "run").rglob("complete.json"))


def test_steps_that_wait_for_slow_storage_say_so_once(local_job, launch, monkeypatch):
    def slow(*arguments):
        writes.append(time.monotonic())
        while monitor.phases.count("saving") == len(writes) and monitor.phases[-1] != "exporting":
            assert time.monotonic() < writes[-1] + HANG_S
            time.sleep(0.01)
        time.sleep(0.1)  # the next save waits by now
        write(*arguments)

    monitor, writes, write = Watcher(), [], weights.FileFormat.write
    monkeypatch.setattr("train_loop.checkpoint.SLOW_S", 0.001)
    monkeypatch.setattr("train_loop.weights.FileFormat.write", slow)
    launch(short(local_job), "run", monitor)
    (said,) = monitor.said("checkpoint_slow")
    assert said.startswith("steps waited 0 s for the checkpoint before")


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


def test_two_workers_resume_exactly_and_one_alone_goes_on_in_the_same_order(local_job, tmp_path, mirror, launch):
    quiet = {"model_details.quantization": None, "train_config.torch_dtype": "float32"}
    job = short(local_job, quiet | {"infra_config": {"gpu_type": "cpu", "gpu_count": 2}, f"{HP}.logging_steps": 1})
    with pytest.raises(Stopped):
        launch(job, "alone", Watcher(stop_at=0))  # for its prepared rows
    model = mirror / job["model_details"]["base_model"]
    on_two = [("whole", job, None), ("cut", job, 3), ("cut", job, None), ("smaller", job, 3)]
    run_group(tmp_path, 2, on_two, tmp_path / "alone/data", model)
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
