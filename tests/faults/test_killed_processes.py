"""Every process of the service, killed with SIGKILL in every phase of a job: the job completes, and with the same bytes."""

from collections.abc import Sequence

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
    S3_AWAY,
    S3_SLOW,
    SERVE,
    Strike,
    Victim,
    survives,
)

pytestmark = pytest.mark.faults
full = pytest.mark.faults_full
RUNNING = PHASES[1:]
AROUND = (INGRESS, PROXY, SERVE, DISPATCHER)
# Phases of one job. While what was killed comes back, nobody may see the job, and it trains on: with half a minute between them.
SEEN_AGAIN = (("queued", "loading_model"), ("preparing_data", "training"))
ALONE = (("waiting_for_resources",), ("evaluating",), ("saving",), ("exporting",))
OWN = {
    JOB_ACTOR: RUNNING,
    CONTROLLER: PHASES[2:],
    RANK_0: PHASES[3:],
    RANK_1: PHASES[3:],
}


def _each(victims: Sequence[Victim], phases: Sequence[str]) -> list[Strike]:
    return [(phase, victims) for phase in phases]


@pytest.mark.parametrize(
    "strikes",
    [
        *(pytest.param(_each(AROUND, phases), id=f"all-at-once-{phases[0]}") for phases in SEEN_AGAIN),
        *(
            pytest.param(_each([v], phases), id=f"{v.name.replace(' ', '-')}-{phases[0]}", marks=full)
            for v in AROUND
            for phases in (*SEEN_AGAIN, *ALONE)
        ),
    ],
)
def test_a_job_runs_on_while_the_service_around_it_is_killed(service, table, strikes, request):
    job = survives(service, table, f"around-{request.node.callspec.id}", strikes)
    assert job["attempt"] == 1


@pytest.mark.parametrize(
    "strikes",
    [
        pytest.param(
            [
                ("preparing_data", [JOB_ACTOR]),
                ("waiting_for_resources", [CONTROLLER]),
                ("loading_model", [RANK_0]),
                ("evaluating", [RANK_1]),
                ("saving", [JOB_ACTOR]),
                ("exporting", [CONTROLLER]),
            ],
            id="one-after-the-other",
            marks=pytest.mark.timeout(600),  # it has seven attempts
        ),
        *(
            pytest.param(_each([victim], [phase]), id=f"{victim.name.replace(', ', '-').replace(' ', '-')}-{phase}", marks=full)
            for victim, phases in OWN.items()
            for phase in phases
        ),
    ],
)
def test_a_job_whose_own_process_is_killed_goes_on_in_another_attempt(service, table, strikes, request):
    job = survives(service, table, f"own-{request.node.callspec.id}", strikes)
    assert job["attempt"] == 1 + len(strikes)


@pytest.mark.parametrize(
    "strikes",
    [
        pytest.param([("training", [RAYLET]), ("saving", [GCS])], id="both"),
        *(pytest.param(_each([v], [p]), id=f"{v.name}-{p}", marks=full) for v in (RAYLET, GCS) for p in RUNNING),
    ],
)
def test_ray_itself_is_killed_and_comes_back_with_the_service_and_the_job(service, table, strikes, request):
    survives(service, table, f"ray-{request.node.callspec.id}", strikes)


@pytest.mark.parametrize(
    "strikes",
    [
        pytest.param([("preparing_data", [DATA_TASK]), ("training", [S3_AWAY]), ("saving", [S3_SLOW])], id="some"),
        pytest.param(_each([S3], PHASES), id="S3-everywhere", marks=full),
    ],
)
def test_a_job_waits_for_an_object_storage_that_is_away_or_slow_and_repeats_a_killed_task(service, table, strikes, request):
    job = survives(service, table, f"data-{request.node.callspec.id}", strikes)
    assert job["attempt"] == 1
