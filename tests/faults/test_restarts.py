"""The whole service goes away, in order or by SIGKILL: what ran goes on, what waited runs, what was finished is still there."""

import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ORG
from tests.faults.harness import SAVE_STEPS, SAVED_STEP, Row, Service, ends_well
from tests.running import DATASETS, members

pytestmark = pytest.mark.faults


def _down(service: Service) -> None:
    service.down()


def _kill_everything(service: Service) -> None:
    """What a power cut does, except to the disk's cache."""
    state = service.state()
    supervisor = psutil.Process(state["pid"])
    supervisor.kill()
    for process in members(state["instance"]):
        process.kill()


def test_jobs_go_on_each_time_that_the_whole_service_was_away(service, table):
    finished = list(service.client.iter_jobs(ORG, status="COMPLETED"))
    assert finished
    running, far, queued, back_at = service.submit("away-running"), SAVED_STEP, [], []
    # The second one, who is asked to end, takes longer, while the job trains on.
    for attempt, end in enumerate((_kill_everything, _down), start=1):
        service.until(running, lambda job, attempt=attempt: job["status"] == "RUNNING" and job["attempt"] == attempt, "its start")
        with service.held():
            service.until(running, lambda job, far=far: job["phase"] == "training" and job["step"] >= far, "a checkpoint")
            # Of a queued job that goes on to its end test_killed_processes.py tells; this one shows that it is started, and once.
            missing = {"dataset_details.dataset_path": f"s3://{DATASETS}/missing.jsonl"}
            queued.append(service.submit(f"away-queued-{attempt}", missing))
            temporary = Path(service.state()["ray_dir"])
            assert temporary.exists()
            end(service)
            service.start()
            assert not temporary.exists()
            far = service.newest_checkpoint(running) + SAVE_STEPS + 1
        service.wait_ready()
        back_at.append(time.monotonic())
        for job in finished:
            assert service.client.get(job["request_id"], ORG)["status"] == "COMPLETED"
    made = [Row(f"everything ({how})", "training") for how in ("kill -9", "down")]
    table.rows += made
    assert ends_well(service, table, running, made, back_at)["attempt"] == 3
    ended = [service.wait(request_id) for request_id in queued]
    assert [(job["attempt"], job["error_code"]) for job in ended] == [(1, "object_not_found")] * 2
    resumed = service.resumed_at(running)
    assert SAVE_STEPS <= resumed[2] <= resumed[3]
