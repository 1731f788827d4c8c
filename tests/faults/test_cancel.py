"""A job canceled in any phase leaves nothing behind, and goes on from where it was when it is resumed."""

from itertools import pairwise

import httpx
import psutil
import pytest

from tests.conftest import ORG
from tests.faults.harness import IN_TRAINING, PHASES, Row, Service

pytestmark = pytest.mark.faults
PROMPT_S = 5.0  # from the end of the step under way
NOISE_S = 30.0  # of a busy machine; who needs the grace period (60 s) is later than that
HOLDERS = ("TrainController", "RayTrainWorker")  # what holds CPUs, GPUs and memory of a job


def _in_ray(service: Service, kind: str) -> list[dict]:
    answer = httpx.get(f"{service.up['dashboard_url']}/api/v0/{kind}", params={"detail": 1, "limit": 10_000}, timeout=30)
    return answer.raise_for_status().json()["data"]["result"]["result"]


def _holders(service: Service) -> list[str]:
    """What still holds resources for a job, as Ray has it."""
    actors = [a for a in _in_ray(service, "actors") if a["class_name"] in HOLDERS and a["state"] != "DEAD"]
    groups = [g for g in _in_ray(service, "placement_groups") if g["state"] != "REMOVED"]
    return [*(f"actor {a['class_name']} {a['state']}" for a in actors), *(f"placement group {g['state']}" for g in groups)]


def _wait_for_processes(service: Service) -> None:
    """Ray counts an actor as dead a moment before its process has ended."""
    left = [process for name in HOLDERS for process in service.processes(name)]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert alive == []


def _took_s(service: Service, request_id: str) -> float:
    """From the wish to cancel until everything was free."""
    job = service.store.get(request_id)
    assert job is not None
    return (job.completed_at - job.cancel_requested_at).total_seconds()


def _step_s(service: Service, request_id: str) -> float:
    """What the longest step so far took."""
    times = [p["time"] for p in service.client.metrics(request_id, ORG)["points"]]
    return max((after - before for before, after in pairwise(times)), default=0.0)


@pytest.mark.parametrize(
    "phases",
    [
        pytest.param(["queued", "waiting_for_resources", "training"], id="some"),
        pytest.param(
            ["preparing_data", "loading_model", "evaluating", "saving"],
            id="the-rest",
            marks=pytest.mark.faults_full,
        ),
    ],
)
def test_a_canceled_job_holds_nothing_and_resumes_where_it_was(service, table, phases, request):
    with service.held():
        request_id = service.submit(f"canceled-{request.node.callspec.id}")
        attempt, saved = 0, dict[int, int]()  # by the attempt that must go on from there
        if phases[0] == "queued":
            assert service.client.cancel(request_id, ORG)["status"] == "CANCELED"
    for phase in phases:
        if phase != "queued":
            steps = 1 if phase in IN_TRAINING else 0
            service.until(
                request_id,
                lambda job, phase=phase, steps=steps: job["phase"] == phase and job["step"] >= steps,
                f"phase {phase}",
            )
            service.client.cancel(request_id, ORG)
            attempt += 1
        canceled = service.wait(request_id, every_s=0.05)
        assert canceled["status"] == "CANCELED", service.describe(request_id, canceled)
        assert (canceled["attempt"], canceled["output_model_path"]) == (attempt, None)
        assert _holders(service) == []
        _wait_for_processes(service)
        assert _took_s(service, request_id) < PROMPT_S + _step_s(service, request_id) + NOISE_S
        if phase in IN_TRAINING:
            saved[attempt + 1] = service.newest_checkpoint(request_id)
            assert saved[attempt + 1] == canceled["step"] > 0
        assert service.client.resume(request_id, ORG)["status"] == "QUEUED"
    job = service.finished(request_id)
    assert service.resumed_at(request_id) == saved
    result = service.result(job)
    table.rows += [
        Row("nothing: canceled, resumed", p, job["status"], job["attempt"], None, result.final_loss, result == table.undisturbed)
        for p in phases
    ]
    assert result == table.undisturbed
    steps = [p["step"] for p in service.client.metrics(request_id, ORG)["points"]]
    assert steps == sorted(set(steps))


def test_every_phase_is_canceled_somewhere_here():
    """`exporting` is left out: by then there is no step boundary to stop at, and the job may as well complete."""
    marks = test_a_canceled_job_holds_nothing_and_resumes_where_it_was.pytestmark
    canceled = {phase for mark in marks if mark.name == "parametrize" for case in mark.args[1] for phase in case.values[0]}
    assert canceled == set(PHASES) - {"exporting"}
