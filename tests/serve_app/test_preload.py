"""What a process that waits for a job has loaded by then."""

import os
import subprocess
import sys

import pytest

from serve_app import preload
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


@pytest.mark.skipif(sys.platform != "linux", reason="niceness is a process's elsewhere")
def test_everything_else_goes_first_while_it_loads_and_no_longer(tmp_path, monkeypatch):
    (tmp_path / "module_to_load.py").write_text("import os\nniceness = os.getpriority(os.PRIO_PROCESS, 0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    preload.load(["module_to_load"])
    assert sys.modules.pop("module_to_load").niceness == min(19, before + preload.NICENESS)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
