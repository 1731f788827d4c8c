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


def test_each_job_is_given_processes_that_waited_and_that_no_job_had_before(service):
    had = set()
    for name in ("first", "second"):
        ready(service)
        job = service.job(name, {"infra_config": {"gpu_type": "cpu", "gpu_count": WORKERS}} | LONG)
        submitted_at = time.time()
        request_id = service.client.submit(job)["request_id"]
        service.wait(request_id, lambda job: job["step"] > 0)
        own = set(processes(service, "ray::JobActor")) | set(processes(service, "ray::RayTrainWorker"))
        assert len(own) == 1 + WORKERS
        assert [p for p in own if p.create_time() > submitted_at] == []
        assert not had & own
        had |= own
        service.client.cancel(request_id, ORG)
        service.wait(request_id)
    _, alive = psutil.wait_procs(had, timeout=FINISH_S)
    assert not alive
