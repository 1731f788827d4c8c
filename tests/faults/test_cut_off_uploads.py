"""A worker dies while a checkpoint's files are on their way into the object storage: what is there of it counts for nobody."""

import time

import pytest

from tests.conftest import ORG
from tests.faults.harness import HP, SAVE_STEPS, Service, checkpoints
from tests.running import FINISH_S

pytestmark = [pytest.mark.faults, pytest.mark.faults_full]
STEPS = 40
# Every weight and its moments: tens of MB, which take the storage long enough to be seen on their way.
LARGE = {"train_config.train_type": "full", "model_details.quantization": None, f"{HP}.max_steps": STEPS}


def _under_way(service: Service, request_id: str) -> int:
    """The step of the checkpoint that is being uploaded behind a whole one; 0 if there is none."""
    prefix = f"runs/{ORG}/{request_id}/"
    begun = service.s3().list_multipart_uploads(Bucket="tuneyard", Prefix=prefix).get("Uploads", [])
    files = service.run_files(request_id)
    there = checkpoints([*files, *(upload["Key"].removeprefix(prefix) for upload in begun)], whole=False)
    whole = checkpoints(files, whole=True)
    return max(there - whole, default=0) if whole and max(there) > max(whole) else 0


def _kill_during_an_upload(service: Service, request_id: str) -> tuple[int, int]:
    """Kill rank 0, which uploads; the steps of the newest whole checkpoint and of the one that was cut off."""
    deadline = time.monotonic() + FINISH_S
    workers = []
    while time.monotonic() < deadline:
        workers = [p for p in workers if p.is_running()] or service.worker(0)
        if workers and (step := _under_way(service, request_id)):
            for worker in workers:
                worker.kill()
            if (whole := service.newest_checkpoint(request_id)) < step:
                return whole, step
        time.sleep(0.01)
    raise AssertionError(f"no upload was caught: {service.describe(request_id, service.client.get(request_id, ORG))}")


def test_a_checkpoint_that_was_cut_off_is_never_picked_up(service):
    request_id = service.submit("cut-off", LARGE)
    whole, cut_off = _kill_during_an_upload(service, request_id)
    attempt = service.client.get(request_id, ORG)["attempt"]
    assert whole >= SAVE_STEPS
    service.finished(request_id)
    resumed = service.resumed_at(request_id)
    assert min(a for a in resumed if a > attempt) == attempt + 1
    assert resumed[attempt + 1] == whole < cut_off
    points = service.client.metrics(request_id, ORG)["points"]
    assert [p["step"] for p in points if p.get("loss") is not None] == list(range(1, STEPS + 1))
    files = service.run_files(request_id)
    assert checkpoints(files, whole=True) == checkpoints(files, whole=False)  # what was cut off is whole by now, or gone
