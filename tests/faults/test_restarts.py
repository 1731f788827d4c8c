"""The whole service goes away, in order or by SIGKILL: what ran goes on, what waited runs, what was finished is still there."""

from pathlib import Path

import psutil
import pytest

from tests.conftest import ORG
from tests.faults.harness import SAVE_STEPS, SAVED_STEP, Row, Service
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


@pytest.mark.parametrize("end", [_down, _kill_everything], ids=["down", "kill-9"])
def test_jobs_go_on_after_the_whole_service_was_away(service, table, end, request):
    name = request.node.callspec.id
    finished = list(service.client.iter_jobs(ORG, status="COMPLETED"))
    assert finished
    running = service.submit(f"{name}-running")
    service.until(running, lambda job: job["status"] == "RUNNING", "its start")
    with service.held():
        service.until(running, lambda job: job["phase"] == "training" and job["step"] >= SAVED_STEP, "a checkpoint")
        # Of a queued job that goes on to its end test_killed_processes.py tells; this one shows that it was started, and once.
        queued = service.submit(f"{name}-queued", {"dataset_details.dataset_path": f"s3://{DATASETS}/missing.jsonl"})
        temporary = Path(service.state()["ray_dir"])
        assert temporary.exists()
        end(service)
        service.start()
        assert not temporary.exists()
    service.wait_ready()
    for job in finished:
        assert service.client.get(job["request_id"], ORG)["status"] == "COMPLETED"
    again, first = service.finished(running), service.wait(queued)
    assert (again["attempt"], first["attempt"], first["error_code"]) == (2, 1, "object_not_found")
    assert service.resumed_at(running)[2] >= SAVE_STEPS
    result = service.result(again)
    same = result == table.undisturbed
    table.rows.append(Row(f"everything ({name})", "training", again["status"], again["attempt"], None, result.final_loss, same))
    assert same
