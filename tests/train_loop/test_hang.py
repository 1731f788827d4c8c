"""A process that stops making steps says where it is and ends; one that goes on is left alone."""

import itertools
import subprocess
import sys

import pytest
from pyarrow.fs import LocalFileSystem

from tests.conftest import TINY
from tests.train_loop.runs import HP, Watcher
from train_loop.context import LocalContext
from train_loop.data.shards import PreparedDataset
from train_loop.errors import Stopped
from train_loop.hang import EXIT_CODE, StepClock
from train_loop.loop import run as train
from train_loop.spec import JobSpec

HANGS = """
import ctypes, logging, sys, threading, time
from train_loop.hang import StepClock, Watchdog

logging.basicConfig(stream=sys.stderr, level="INFO")

def waits_for_ever():
    if sys.argv[1] == "waiting":
        threading.Event().wait()
    else:
        ctypes.PyDLL(None).sleep(1000)  # keeps Python's lock

with Watchdog(StepClock(floor_s=0.5, factor=3), lambda message: print("told:", message, flush=True)) as watchdog:
    watchdog.beat("slow")  # the first limit is six times the floor
    time.sleep(1.5)
    for _ in range(5):
        time.sleep(0.1)
        watchdog.beat("step")
    print("five steps", flush=True)
    if sys.argv[1] != "ending":
        waits_for_ever()
time.sleep(2)
print("ended well", flush=True)
"""


def run(how):
    return subprocess.run([sys.executable, "-c", HANGS, how], capture_output=True, text=True, timeout=120, check=False)


def test_a_process_that_waits_for_ever_says_where_tells_and_ends():
    done = run("waiting")
    assert done.returncode == EXIT_CODE
    assert done.stdout.startswith("five steps\ntold: No step for ")
    assert "this worker hangs; its threads are at" in done.stderr
    assert "in waits_for_ever" in done.stderr
    assert "thread MainThread:" in done.stderr


def test_a_process_that_keeps_pythons_lock_is_ended_by_the_backstop():
    done = run("stuck")
    assert done.returncode not in (0, EXIT_CODE)
    assert done.stdout == "five steps\n"
    assert "in waits_for_ever" in done.stderr


def test_a_process_that_ends_its_run_is_left_alone():
    done = run("ending")
    assert (done.returncode, done.stdout) == (0, "five steps\nended well\n")


@pytest.mark.parametrize(
    ("steps", "limit"), [([], 10), ([0.1] * 9, 10), ([3] * 9, 60), ([3] * 9 + [500] * 4, 60), ([1] * 99 + [9] * 99, 180)]
)
def test_the_limit_follows_recent_steps_and_never_goes_below_the_floor(steps, limit):
    clock = StepClock(floor_s=10, factor=20)
    for step in steps:
        clock.took(step)
    assert clock.limit_s == limit


def test_every_micro_batch_of_a_step_is_a_sign_of_life(local_job, tmp_path, mirror, launch):
    class Beating(LocalContext):
        def beat(self, kind="other"):
            beats.append(kind)

    few = {f"{HP}.max_steps": 2, f"{HP}.per_device_train_batch_size": 1, f"{HP}.gradient_accumulation_steps": 3}
    job = local_job(few | {"dataset_config.split": {"type": "none"}, "model_details.quantization": None})
    with pytest.raises(Stopped):
        launch(job, "run", Watcher(stop_at=0))
    prepared = PreparedDataset.from_json((tmp_path / "run/data/index.json").read_text())
    (tmp_path / "scratch").mkdir()
    beats = []
    train(
        JobSpec.model_validate(job),
        prepared,
        Beating(mirror / TINY, LocalFileSystem(), str(tmp_path / "run"), tmp_path / "scratch", Watcher()),
    )
    steps = [i for i, kind in enumerate(beats) if kind == "step"]
    assert [beats[one + 1 : other].count("other") for one, other in itertools.pairwise([0, *steps])] == [3, 3]
