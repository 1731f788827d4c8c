"""A worker that stands still, as on a machine that swaps or in a driver that never returns: seen, written down, and gone past."""

import psutil
import pytest

from tests.conftest import ORG
from tests.faults.conftest import SETTINGS
from tests.faults.harness import HP, SAVE_STEPS, SAVED_STEP, Row, Service

pytestmark = [pytest.mark.faults, pytest.mark.faults_full]
SILENT_S = 20


@pytest.fixture(scope="module")
def impatient(tmp_path_factory, mirror):
    """A service that takes a silence of seconds for a hang."""
    limits = {"TUNEYARD_HANG_FLOOR_S": str(SILENT_S), "TUNEYARD_HANG_FACTOR": "3"}  # by default many times a slow machine's step
    with Service(tmp_path_factory.mktemp("hangs"), mirror, **SETTINGS, **limits).up_with_data() as running:
        yield running


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_stands_still_is_seen_by_the_other_one_and_the_run_goes_on(impatient, table_rows, rank):
    service = impatient
    request_id = service.submit(f"stands-still-{rank}", {f"{HP}.max_steps": 200})  # trains for longer than it takes to be found
    service.until(
        request_id,
        lambda job: job["phase"] == "training" and job["step"] >= SAVED_STEP and len(service.worker(rank)) == 1,
        "a checkpoint",
    )
    [stopped] = service.worker(rank)
    stopped.suspend()
    job = service.finished(request_id)
    table_rows.append(Row(f"nothing: rank {rank} stopped", "training", job["status"], job["attempt"]))
    events = service.client.events(request_id, ORG)["events"]
    [hang] = [e["message"] for e in events if e["kind"] == "hang"]
    assert "No step for" in hang
    logged = [entry["line"] for entry in service.client.logs(request_id, ORG, rank=1 - rank)["logs"]]
    assert any("this worker hangs; its threads are at" in line for line in logged)
    assert any("train_loop/loop.py" in line for line in logged)
    assert job["attempt"] == 2
    assert service.resumed_at(request_id)[2] >= SAVE_STEPS
    assert sorted(service.result(job).losses) == list(range(1, job["total_steps"] + 1))
    _, alive = psutil.wait_procs([stopped], timeout=20)
    assert alive == []
