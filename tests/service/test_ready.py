"""Processes that wait for jobs in the embedded service."""

import json
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ORG, rows
from tests.running import DATASETS, FINISH_S, Running, members
from train_loop.launch import TRAINS

pytestmark = pytest.mark.service
WORKERS = 2
LONG = {"train_config.hyperparameters.num_epochs": 500, "train_config.hyperparameters.dataloader_num_workers": 0}


@pytest.fixture(scope="module")
def service(tmp_path_factory, mirror):
    running = Running(tmp_path_factory.mktemp("home"), mirror, TUNEYARD_READY_WORKERS=str(WORKERS))
    running.start()
    s3 = running.s3()
    s3.create_bucket(Bucket=DATASETS)
    s3.put_object(Bucket=DATASETS, Key="rows.jsonl", Body="\n".join(json.dumps(r) for r in rows(60)))
    yield running
    running.down()


def processes(service, title):
    return [p for p in members(service.state()["instance"]) if p.info["cmdline"] and p.info["cmdline"][0].startswith(title)]


def waiting(service):
    """The processes that wait: of workers with all of it loaded, and of helpers."""
    idle = {p for p in processes(service, "ray::IDLE") if p.environ()["RAY_JOB_ID"] == "ffffffff"}
    workers = {p for p in idle if TRAINS in p.environ()}
    return {p for p in workers if "bitsandbytes" in Path(f"/proc/{p.pid}/maps").read_text()}, idle - workers


def ready(service):
    deadline = time.monotonic() + FINISH_S
    while time.monotonic() < deadline:
        workers, helpers = waiting(service)
        if len(workers) >= WORKERS and helpers:
            return workers | helpers
        time.sleep(0.5)
    raise AssertionError(f"only {waiting(service)} wait")


def test_each_job_is_given_processes_that_waited_and_that_no_job_had_before(service):
    had = set()
    for name in ("first", "second"):
        before = ready(service)
        assert not had & before
        job = service.job(name, {"infra_config": {"gpu_type": "cpu", "gpu_count": WORKERS}} | LONG)
        request_id = service.client.submit(job)["request_id"]
        service.wait(request_id, lambda job: job["step"] > 0)
        found = {title: set(processes(service, f"ray::{title}")) for title in ("JobActor", "TrainController", "RayTrainWorker")}
        assert len(found["RayTrainWorker"]) == WORKERS
        assert all(those <= before for those in found.values()), (found, before)
        had |= set.union(*found.values())
        service.client.cancel(request_id, ORG)
        service.wait(request_id)
    assert not [p for p in had if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
