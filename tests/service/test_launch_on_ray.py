"""Attempts on Ray: how each way of ending one is told, and what the next one goes on from."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from pyarrow.fs import LocalFileSystem
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from ray.util.state import list_actors

from tests.conftest import TINY, rows
from tests.train_loop.memory_group import memory_group
from tests.train_loop.test_bad_data import FILES, HTML, JSONL, listed, malformed_job, outcome
from tests.train_loop.zips import FIELDS, Chat, picture, row, zipped
from train_loop.allocator import environment
from train_loop.cleaner import may_live
from train_loop.data import parts, pipeline
from train_loop.data.pipeline import prepare_with_ray
from train_loop.data.prepare import prepare_local
from train_loop.data.sources import find_files
from train_loop.data.tokenize import ChatTokenizer
from train_loop.errors import Cause, DatasetError, ModelError, RunFault, Stopped
from train_loop.faults import classified
from train_loop.launch import ActorMonitor, Placement, launch
from train_loop.model.tokenizer import load_tokenizer
from train_loop.run_files import Keys, RunFiles
from train_loop.spec import JobSpec

pytestmark = pytest.mark.service
HP = "train_config.hyperparameters"
NAMESPACE = "attempts"
WAIT_S = 240
# Takes what the control group has, files that the kernel can drop included, until it has ended a process: Ray has the kernel
# choose its workers first. Slow enough to stop before there is a next one. Where the kernel looks for one before the first has
# given its memory back, it is to find this one, not the agent without which the raylet ends.
HOG = """
import contextlib, pathlib, sys, time
pathlib.Path("/proc/self/oom_score_adj").write_text("500")
held, command = [], pathlib.Path("/proc", sys.argv[1], "cmdline")
with contextlib.suppress(OSError):
    while command.read_bytes():
        held.append(b"x" * 4_000_000)
        time.sleep(0.01)
time.sleep(300)
"""


@ray.remote(num_cpus=0, max_concurrency=8)
class Recorder:
    """A monitor that remembers."""

    def __init__(self):
        self.step, self.stop_at, self.told, self.current = -1, None, None, True
        self.phases, self.events, self.lines, self.at = [], [], [], {}

    def keys(self):
        return Keys()

    def on_phase(self, name):
        self.phases.append(name)

    def on_event(self, kind, message):
        self.events.append((kind, message))

    def on_progress(self, progress):
        self.step = progress["step"]

    def on_log(self, rank, lines):
        self.lines += [(rank, line) for _, line in lines]

    def stop_requested(self):
        return self.stop_at is not None and self.step >= self.stop_at

    def is_current(self):
        return self.current

    def supersede(self):
        self.current = False

    def on_place(self, rank, place):
        self.at[rank] = place

    def places(self):
        return list(self.at.values())

    def on_failure(self, error):
        self.told = self.told or error

    def failure(self):
        return self.told

    def ask_to_stop(self, step):
        self.stop_at = step

    def seen(self):
        return self.step, self.phases, self.events, self.lines


@pytest.fixture(scope="module")
def cluster():
    # A machine that is short of memory may not answer for a while: it isn't to count as lost for that. One that is gone refuses.
    head = {"num_cpus": 4, "dashboard_host": "127.0.0.1", "include_dashboard": True}
    made = Cluster(initialize_head=True, head_node_args=head | {"_system_config": {"health_check_timeout_ms": 60_000}})
    ray.init(address=made.address, namespace=NAMESPACE, logging_level="warning", log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture
def start(cluster, local_job, tmp_path, mirror):
    """Start an attempt at the test's job; returns what it ends with, and its monitor."""
    monitors, specs = [], []
    with ThreadPoolExecutor() as pool:

        def begin(changes=None, resources=None, **placement):
            if not specs:
                base = {"infra_config": {"gpu_type": "cpu", "gpu_count": 2}, f"{HP}.max_steps": 3000, f"{HP}.save_steps": 5}
                specs.append(JobSpec.model_validate(local_job(base | (changes or {}))))
            name = f"monitor-{tmp_path.name}-{len(monitors)}"
            # On the head, as job actors are: Ray puts an actor that takes nothing anywhere, and a test takes nodes away.
            monitors.append(Recorder.options(name=name, resources={"node:__internal_head__": 0.001}).remote())
            found = ActorMonitor(name, NAMESPACE)
            files = RunFiles(str(tmp_path / "run"), str(mirror), found.keys)
            place = Placement(resources={"CPU": 0.5} | (resources or {}), data_cpus=0.5, **placement)
            return pool.submit(launch, specs[0], tmp_path.name, files, place, found), monitors[-1]

        yield begin
        for monitor in monitors:
            ray.get(monitor.ask_to_stop.remote(-1))  # whatever still runs


def wait_for_step(end, monitor, step):
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and not end.done():
        if ray.get(monitor.seen.remote())[0] >= step:
            return
        time.sleep(0.1)
    raise AssertionError(f"no step {step}: {end.exception() if end.done() else ray.get(monitor.seen.remote())[:3]}")


def workers():
    """The processes of the attempt's workers."""
    found = psutil.Process().children(recursive=True)
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE and p.cmdline()[:1] == ["ray::RayTrainWorker"]]


def events(monitor, kind):
    return [message for k, message in ray.get(monitor.seen.remote())[2] if k == kind]


def test_an_error_of_the_user_in_a_worker_is_raised_as_it_is(start):
    end, _ = start({"train_config.adapter_config.targets": ["no_such_layer"], "infra_config.gpu_count": 1})
    error = end.exception(WAIT_S)
    assert type(error) is ModelError
    assert error.field == "train_config.adapter_config.targets"
    assert error.message.startswith(f"the adapter doesn't fit {TINY}")


def test_a_killed_worker_ends_the_attempt_and_a_smaller_one_completes_the_job(start, tmp_path):
    end, monitor = start({f"{HP}.max_steps": 60})
    wait_for_step(end, monitor, 7)
    assert all(environment()["LD_PRELOAD"] in Path(f"/proc/{p.pid}/maps").read_text() for p in workers())
    workers()[1].kill()
    error = end.exception(WAIT_S)
    assert isinstance(error, RunFault)
    assert error.cause == Cause.WORKER_DIED

    end, monitor = start(num_workers=1)
    manifest = end.result(WAIT_S)
    (resumed,) = events(monitor, "resumed")
    first = int(resumed.removeprefix("resumed from the checkpoint of step "))
    assert first >= 5
    assert manifest["worlds"] == [{"from_step": 1, "world_size": 2}, {"from_step": first + 1, "world_size": 1}]
    assert "prepared by an earlier attempt" in events(monitor, "prepared")[0]
    steps = [json.loads(line)["step"] for line in Path(tmp_path, "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(61))

    (tmp_path / "run/manifest.json").unlink()
    end, monitor = start()
    again = end.result(WAIT_S)
    assert again["adapter_files"] == manifest["adapter_files"]
    assert ray.get(monitor.seen.remote())[1] == ["preparing_data"]  # nothing was trained again


def test_a_hang_is_seen_by_the_other_worker_and_its_stacks_are_logged(start):
    # Without checkpoints, which may take six times as long as a step.
    end, monitor = start({f"{HP}.save_steps": 100_000}, hang_floor_s=8.0, hang_factor=3.0)
    wait_for_step(end, monitor, 3)
    stopped = workers()[1]
    stopped.send_signal(signal.SIGSTOP)
    try:
        error = end.exception(WAIT_S)
    finally:
        if stopped.is_running():
            stopped.send_signal(signal.SIGCONT)
    assert isinstance(error, RunFault)
    assert error.cause == Cause.HANG
    assert error.message.startswith("No step for ")
    lines = [line for _, line in ray.get(monitor.seen.remote())[3]]
    assert any("this worker hangs; its threads are at" in line for line in lines)
    assert any("in all_reduce" in line for line in lines)


def test_an_attempt_that_another_one_has_superseded_writes_nothing_that_counts(start, tmp_path):
    end, monitor = start({f"{HP}.save_steps": 10, "infra_config.gpu_count": 1})
    wait_for_step(end, monitor, 12)
    ray.get(monitor.supersede.remote())
    error = end.exception(WAIT_S)
    assert isinstance(error, RunFault)
    assert error.cause == Cause.SUPERSEDED
    whole = [p.parent.name for p in (tmp_path / "run/checkpoints").glob("*/complete.json")]
    last = ray.get(monitor.seen.remote())[0]
    assert max(whole) < f"step-{last // 10 * 10:08d}"
    assert not (tmp_path / "run/outcome.json").exists()


def test_a_stopped_attempt_leaves_a_checkpoint_of_the_step_it_stopped_at(start, tmp_path):
    end, monitor = start()
    ray.get(monitor.ask_to_stop.remote(8))
    assert isinstance(end.exception(WAIT_S), Stopped)
    step, phases, _, _ = ray.get(monitor.seen.remote())
    assert step >= 8
    assert phases[-2:] == ["saving", "training"]
    assert (tmp_path / f"run/checkpoints/step-{step:08d}/complete.json").is_file()


def test_a_notice_saves_a_checkpoint_at_once_and_the_attempt_ends_as_preempted(cluster, start, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")  # so that the notice can be a short one
    node = cluster.add_node(num_cpus=1, resources={"spot": 1})
    end, monitor = start({f"{HP}.save_steps": 100_000}, resources={"spot": 1}, num_workers=1)
    wait_for_step(end, monitor, 2)
    notice = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back", "--deadline-remaining-seconds", "10"]
    ray_command = Path(sys.executable).parent / "ray"
    subprocess.run([ray_command, "drain-node", "--address", cluster.address, "--node-id", node.node_id, *notice], check=True)
    error = end.exception(WAIT_S)
    cluster.remove_node(node)
    assert isinstance(error, RunFault)
    assert error.cause == Cause.PREEMPTED
    (told,) = events(monitor, "preempted")
    step = int(told.removesuffix(" is saved").rpartition(" ")[2])
    assert told.startswith("the machine of worker 0 will be taken back by ")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert ray.get(monitor.seen.remote())[0] > step  # it went on


def has_torch(pid):
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def test_what_a_dead_controller_had_is_taken_from_it_and_a_silent_dashboard_is_no_death(cluster, start, monkeypatch):
    end, monitor = start({"infra_config.gpu_count": 1})
    wait_for_step(end, monitor, 1)
    alive = {a.class_name: a for a in list_actors(cluster.address, filters=[("state", "=", "ALIVE")])}
    assert "Cleaner" in alive
    assert not {"PlacementGroupCleaner", "DatasetManager"} & alive.keys()
    # Loading torch takes seconds.
    assert {name for name, actor in alive.items() if has_torch(actor.pid)} - {"Recorder"} == {"RayTrainWorker"}
    controller = alive["TrainController"]
    assert may_live(controller.actor_id, 10)
    with monkeypatch.context() as patch:
        patch.setattr("ray.util.state.get_actor", lambda *_, **__: None)
        assert may_live(controller.actor_id, 10)
        patch.setattr("ray.util.state.get_actor", Mock(side_effect=ConnectionError))
        assert may_live(controller.actor_id, 10)
    psutil.Process(controller.pid).kill()
    assert end.exception(WAIT_S).cause == Cause.WORKER_DIED
    assert not may_live(controller.actor_id, 10)
    deadline = time.monotonic() + WAIT_S
    while any(g["state"] != "REMOVED" for g in placement_group_table().values()):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_worker_that_the_kernel_ends_for_want_of_memory_is_told_from_one_that_died(cluster, start):
    with memory_group() as group:
        node = cluster.add_node(num_cpus=1, resources={"tight": 1})
        raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            group.enter(process.pid)
        end, monitor = start({"infra_config.gpu_count": 1}, resources={"tight": 1}, num_workers=1)
        wait_for_step(end, monitor, 2)
        (worker,) = [p for p in workers() if p.ppid() == raylet.pid]
        group.limit(group.used + (32 << 20))
        hog = subprocess.Popen([sys.executable, "-c", HOG, str(worker.pid)], preexec_fn=group.enter)
        error = end.exception(WAIT_S)
        hog.kill()
        hog.wait()
        cluster.remove_node(node)
    assert isinstance(error, RunFault)
    assert error.cause == Cause.OUT_OF_MEMORY, error.message
    assert "What would lower its need: " in error.message


@pytest.mark.parametrize(
    "file",
    [
        "HTML",
        "a bad line in gzip",
        "damaged zstd",
        "a bad element",
        "an array cut in a row",
        "Parquet with bad text",
        "noise",
        "Parquet without row groups",
    ],
)
def test_malformed_files_end_on_ray_as_in_one_process(cluster, tmp_path, tokenizer, monkeypatch, file):
    monkeypatch.setattr(parts, "RANGE_BYTES", 500)
    name, data = ("f.jsonl", HTML * 3 + JSONL) if file == "HTML" else FILES[file][:2]
    expected = outcome(tmp_path, tokenizer, name, data)
    spec, local = malformed_job(tmp_path / name), LocalFileSystem()
    chat = ChatTokenizer.of(spec, tokenizer)

    def prepare():
        with classified(spec):
            return prepare_with_ray(
                spec,
                find_files(spec, local),
                open_source=LocalFileSystem,
                open_storage=LocalFileSystem,
                run_path=str(tmp_path / "on-ray"),
                load_tokenizer=lambda: chat,
                num_cpus_per_task=1,
            )

    if isinstance(expected, str):
        with pytest.raises(DatasetError) as caught:
            prepare()
        assert caught.value.code == expected
    else:
        assert (prepare().num_rows, listed(tmp_path / "on-ray")) == expected


def test_images_prepared_in_parallel_are_those_prepared_one_by_one(cluster, local_job, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "ZIPPED_RANGE_BYTES", 500)
    local, run = LocalFileSystem(), {name: str(tmp_path / name) for name in ("parallel", "alone")}
    members = {f"{i}.png": picture(i) for i in range(12)}
    (tmp_path / "it.zip").write_bytes(zipped([*(row(f"{i % 12}.png", "0.png") for i in range(40)), row("none.png")], members))
    changes = {"dataset_details.dataset_path": str(tmp_path / "it.zip"), "dataset_config.preprocessing.max_reject_ratio": 0.5}
    spec = JobSpec.model_validate(local_job(FIELDS | changes))
    files = find_files(spec, local)
    found = prepare_with_ray(
        spec,
        files,
        open_source=LocalFileSystem,
        open_storage=LocalFileSystem,
        run_path=run["parallel"],
        load_tokenizer=Chat,
        num_cpus_per_task=1,
    )
    assert found == prepare_local(spec, local, files, local, run["alone"], Chat())
    assert (found.num_rows, found.num_rejected) == (40, 1)
    written = [{p.name: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()} for folder in run.values()]
    assert written[0] == written[1]
    assert sum(name.startswith("images-") for name in written[0]) == len(found.shards) > 8


def test_rows_prepared_in_parallel_are_those_prepared_one_by_one(cluster, local_job, tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(parts, "RANGE_BYTES", 400)
    local = LocalFileSystem()
    made = [*({"conversations": r["conversations"]} for r in rows(80) if "conversations" in r), {}]
    text = "".join(json.dumps(row) + "\n" for row in made).encode()
    (tmp_path / "prefix").mkdir()
    (tmp_path / "prefix/1.jsonl").write_bytes(text)
    (tmp_path / "prefix/2.jsonl.gz").write_bytes(gzip.compress(text))
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "rows.parquet", row_group_size=4)
    for path, dataset_type, lazy in [("prefix/", "jsonl", True), ("rows.parquet", "parquet", False)]:
        at = {"dataset_details.dataset_path": f"{tmp_path}/{path}", "dataset_details.dataset_type": dataset_type}
        how = {"dataset_config.preprocessing.max_reject_ratio": 0.5, "dataset_config.preprocessing.lazy_tokenize": lazy}
        spec = JobSpec.model_validate(local_job(at | how))
        files = find_files(spec, local)
        folders = [str(tmp_path / name / dataset_type) for name in ("parallel", "alone")]

        def tokenizer(spec=spec, loads=tmp_path / f"loads-{dataset_type}"):
            with loads.open("a") as file:
                file.write(f"{os.getpid()}\n")
            deadline = time.monotonic() + WAIT_S
            while len(loads.read_text().split()) < 2:  # only another process, at the same time, sets this one free
                assert time.monotonic() < deadline
                time.sleep(0.05)
            return ChatTokenizer.of(spec, load_tokenizer(mirror / TINY))

        found = prepare_with_ray(
            spec,
            files,
            open_source=LocalFileSystem,
            open_storage=LocalFileSystem,
            run_path=folders[0],
            load_tokenizer=tokenizer,
            num_cpus_per_task=1,
        )
        assert found == prepare_local(spec, local, files, local, folders[1], tokenizer())
        *loads, here = (tmp_path / f"loads-{dataset_type}").read_text().split()
        assert here == str(os.getpid())
        assert {here}.isdisjoint(loads)
        assert len(loads) == len(set(loads)) < len(found.shards)  # once a process, which prepares several parts
        written = [{p.name: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()} for folder in folders]
        assert written[0] == written[1]


@pytest.mark.parametrize("counted_by", ["Ray", "Ray Data too"])
def test_no_more_parts_at_a_time_than_cpus_allow(cluster, local_job, tmp_path, mirror, monkeypatch, counted_by):
    monkeypatch.setattr(parts, "RANGE_BYTES", 800)
    if counted_by == "Ray Data too":
        monkeypatch.setattr(pipeline, "SHORT_BYTES", 0)
    local, running, prepare_part = LocalFileSystem(), tmp_path / "running", pipeline.prepare_part
    running.mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(40)))
    spec = JobSpec.model_validate(local_job({"dataset_details.dataset_path": str(tmp_path / "rows.jsonl")}))

    def watched(spec, source, part, *others):
        mine = running / str(part.index)
        mine.touch()
        time.sleep(0.2)
        with (tmp_path / "together").open("a") as file:
            file.write(f"{len([*running.iterdir()])}\n")
        mine.unlink()
        return prepare_part(spec, source, part, *others)

    monkeypatch.setattr(pipeline, "prepare_part", watched)
    found = prepare_with_ray(
        spec,
        find_files(spec, local),
        open_source=LocalFileSystem,
        open_storage=LocalFileSystem,
        run_path=str(tmp_path / "run"),
        load_tokenizer=lambda: ChatTokenizer.of(spec, load_tokenizer(mirror / TINY)),
        num_cpus_per_task=2,
    )
    together = [int(number) for number in (tmp_path / "together").read_text().split()]
    assert len(together) == len(found.shards) > 4
    assert max(together) <= 2  # of the cluster's 4 CPUs each takes two
