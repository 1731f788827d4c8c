"""What a process that waits for a job has loaded by then."""

import os
import subprocess
import sys

import pytest

from train_loop.launch import TRAINS

LIST = "import serve_app.preload, sys; print(*(name for name in {names} if name in sys.modules))"


def loaded(*names, **environment):
    command = [sys.executable, "-c", LIST.format(names=names)]
    return subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True).stdout.split()


def test_a_worker_that_waits_has_loaded_what_training_takes():
    names = ("torch", "peft", "transformers", "train_loop.loop")
    assert loaded(*names, RAY_JOB_ID="ffffffff", **{TRAINS: "1"}) == list(names)


def test_one_that_waits_beside_workers_has_loaded_everything_but_torch():
    names = ("serve_app.job_actor", "ray.train", "ray.data", "torch")
    assert loaded(*names, RAY_JOB_ID="ffffffff") == ["serve_app.job_actor", "ray.train", "ray.data"]


@pytest.mark.parametrize("job", [{"RAY_JOB_ID": "01000000"}, {}])
def test_a_process_that_is_started_for_a_job_loads_nothing_ahead(job):
    assert loaded("torch", "serve_app.job_actor", **job, **{TRAINS: "1"}) == []
