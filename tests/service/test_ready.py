"""Processes that wait for jobs in the embedded service."""

import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ORG
from tests.running import FINISH_S, members
from train_loop.launch import TRAINS

pytestmark = pytest.mark.service
WORKERS = 2
HP = "train_config.hyperparameters"
LONG = {
    "infra_config": {"gpu_type": "cpu", "gpu_count": WORKERS},
    "dataset_config.preprocessing.max_reject_ratio": 0.1,
    f"{HP}.max_steps": 100_000,
    f"{HP}.save_steps": 5,
    f"{HP}.dataloader_num_workers": 0,
}


def processes(service, title):
    return [p for p in members(service.state()["instance"]) if p.info["cmdline"] and p.info["cmdline"][0].startswith(title)]


def ready(service):
    """Until enough processes wait, those of workers with all of it loaded."""
    deadline = time.monotonic() + FINISH_S
    while time.monotonic() < deadline:
        idle = {p for p in processes(service, "ray::IDLE") if p.environ()["RAY_JOB_ID"] == "ffffffff"}
        workers = {p for p in idle if TRAINS in p.environ()}
        loaded = {p for p in workers if "bitsandbytes" in Path(f"/proc/{p.pid}/maps").read_text()}
        if len(loaded) >= WORKERS and idle - workers:
            return
        time.sleep(0.5)
    raise AssertionError(f"only {idle} wait")


def own(service):
    """The processes of the job that runs."""
    found = {*processes(service, "ray::JobActor"), *processes(service, "ray::RayTrainWorker")}
    assert len(found) == 1 + WORKERS
    return found


def started(service, name):
    """A job that trains, and its processes, all of which waited for it."""
    ready(service)
    submitted_at = time.time()
    request_id = service.client.submit(service.job(name, LONG))["request_id"]
    service.wait(request_id, lambda job: job["step"] > 0)
    its = own(service)
    assert [p for p in its if p.create_time() > submitted_at] == []
    return request_id, its


def test_each_job_is_given_processes_that_waited_and_that_no_job_had_before(service):
    first, had = started(service, "first")
    service.client.cancel(first, ORG)
    service.wait(first)
    second, its = started(service, "second")
    assert not had & its

    service.wait(second, lambda job: job["step"] > 10)  # the second checkpoint waits for the first one to be whole
    (actor,) = processes(service, "ray::JobActor")
    actor.kill()
    service.wait(second, lambda job: any(e["kind"] == "resumed" for e in service.client.events(second, ORG)["events"]))
    again = own(service)
    assert not (had | its) & again
    service.client.cancel(second, ORG)
    ended = service.wait(second)
    assert (ended["status"], ended["attempt"]) == ("CANCELED", 2)
    _, alive = psutil.wait_procs(had | its | again, timeout=FINISH_S)
    assert not alive
