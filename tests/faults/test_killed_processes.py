"""Every process of the service, killed with SIGKILL in every phase of a job: the job completes, and with the same bytes."""

import pytest

from tests.faults.harness import (
    CONTROLLER,
    DATA_TASK,
    DISPATCHER,
    GCS,
    INGRESS,
    JOB_ACTOR,
    PHASES,
    PROXY,
    RANK_0,
    RANK_1,
    RAYLET,
    S3,
    SERVE,
    survives,
)

pytestmark = pytest.mark.faults
full = pytest.mark.faults_full
RUNNING = PHASES[1:]


AROUND = (INGRESS, PROXY, SERVE, DISPATCHER)
# While they come back nobody can see the job's phase, and it trains on: one of the short phases a job.
AROUND_PHASES = (
    ("queued", "preparing_data", "waiting_for_resources", "loading_model", "training", "exporting"),
    ("evaluating",),
    ("saving",),
)


@pytest.mark.parametrize(
    ("victims", "phases"),
    [
        pytest.param(AROUND, AROUND_PHASES[0], id="all-at-once"),
        *(
            pytest.param([v], phases, id=f"{v.name.replace(' ', '-')}-{phases[0]}", marks=full)
            for v in AROUND
            for phases in AROUND_PHASES
        ),
    ],
)
def test_a_job_runs_on_while_the_service_around_it_is_killed(service, table, victims, phases, request):
    job = survives(service, table, f"around-{request.node.callspec.id}", phases, victims)
    assert job["attempt"] == 1


@pytest.mark.parametrize(
    ("victim", "phases"),
    [
        pytest.param(JOB_ACTOR, ["preparing_data", "training", "exporting"], id="job-actor"),
        pytest.param(CONTROLLER, ["waiting_for_resources", "saving"], id="controller"),
        pytest.param(RANK_0, ["loading_model", "training"], id="rank-0"),
        pytest.param(RANK_1, ["evaluating", "saving"], id="rank-1"),
        pytest.param(
            JOB_ACTOR, ["waiting_for_resources", "loading_model", "evaluating", "saving"], id="job-actor-rest", marks=full
        ),
        pytest.param(CONTROLLER, ["loading_model", "training", "evaluating", "exporting"], id="controller-rest", marks=full),
        pytest.param(RANK_0, ["evaluating", "saving", "exporting"], id="rank-0-rest", marks=full),
        pytest.param(RANK_1, ["loading_model", "training", "exporting"], id="rank-1-rest", marks=full),
    ],
)
def test_a_job_whose_own_process_is_killed_goes_on_in_another_attempt(service, table, victim, phases, request):
    job = survives(service, table, request.node.callspec.id, phases, [victim])
    assert job["attempt"] == 1 + len(phases)


@pytest.mark.parametrize(
    ("victim", "phases"),
    [
        pytest.param(RAYLET, ["training"], id="raylet"),
        pytest.param(GCS, ["evaluating"], id="gcs"),
        *(
            pytest.param(v, [p], id=f"{v.name}-in-{p}", marks=full)
            for v, done in ((RAYLET, "training"), (GCS, "evaluating"))
            for p in RUNNING
            if p != done
        ),
    ],
)
def test_ray_itself_is_killed_and_comes_back_with_the_service_and_the_job(service, table, victim, phases, request):
    survives(service, table, request.node.callspec.id, phases, [victim])


def test_a_job_waits_for_an_object_storage_that_is_killed_in_every_phase(service, table):
    survives(service, table, "storage", PHASES, [S3])


def test_a_task_that_reads_the_data_is_killed_and_repeated(service, table):
    job = survives(service, table, "data-task", ["preparing_data"], [DATA_TASK])
    assert job["attempt"] == 1
