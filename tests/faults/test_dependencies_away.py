"""What the service depends on goes away for a while: nothing is doubled, lost or failed because of it."""

import time

import httpx
import psutil
import pytest

from tests.conftest import ORG
from tests.faults.harness import Row, Service, Victim, ends_well, kill_s3_for, survives

pytestmark = pytest.mark.faults
DATABASE_AWAY_S, STORAGE_AWAY_S = 20, 60


@pytest.mark.faults_full
def test_a_job_waits_while_its_object_storage_is_away_for_a_minute(service, table):
    row = Row(f"S3 for {STORAGE_AWAY_S} s", "training")
    table.rows.append(row)
    request_id = service.submit("storage-away")
    service.until(request_id, lambda job: job["step"] >= 5, "its fifth step")
    kill_s3_for(service, STORAGE_AWAY_S)
    ends_well(service, table, request_id, [row], [time.monotonic()])


@pytest.fixture(scope="module")
def on_postgres(tmp_path_factory, mirror, postgres, shot_at):
    """A service whose store is a PostgreSQL of its own."""
    url = postgres.get_uri().replace("postgresql://", "postgresql+psycopg://")
    running = Service(tmp_path_factory.mktemp("faults-pg"), mirror, **shot_at, TUNEYARD_DATABASE_URL=url)
    running.start()
    try:
        running.upload()
        yield running
    finally:
        postgres.ensure_postgres_running()
        running.down()


def _processes(postgres) -> list[psutil.Process]:
    postmaster = psutil.Process(postgres.get_pid())
    return [postmaster, *postmaster.children(recursive=True)]


def test_the_api_says_so_while_the_database_is_away_and_the_job_that_trains_completes(on_postgres, postgres, table):
    service, row = on_postgres, Row(f"PostgreSQL for {DATABASE_AWAY_S} s", "training")
    table.rows.append(row)
    request_id = service.submit("database-away")
    service.until(request_id, lambda job: job["step"] >= 5, "its fifth step")
    postgres.stop()
    back_at = time.monotonic() + DATABASE_AWAY_S
    headers = {"Authorization": f"Bearer {service.token}"}
    while time.monotonic() < back_at:
        answers = [
            httpx.get(f"{service.up['url']}/job/{request_id}", headers=headers),
            httpx.post(f"{service.up['url']}/job/", headers=headers, json=service.job("never")),
            httpx.get(f"{service.up['url']}/readyz"),
        ]
        assert [(a.status_code, "Retry-After" in a.headers) for a in answers] == [(503, True)] * 3
        time.sleep(1)
    postgres.ensure_postgres_running()
    ends_well(service, table, request_id, [row], [back_at])
    assert [j["experiment_name"] for j in service.client.iter_jobs(ORG)] == ["database-away"]


@pytest.mark.parametrize(
    "phases",
    [
        pytest.param(["loading_model", "exporting"], id="some"),
        pytest.param(
            ["queued", "preparing_data", "waiting_for_resources", "training", "evaluating", "saving"],
            id="rest",
            marks=pytest.mark.faults_full,
        ),
    ],
)
def test_a_job_survives_a_database_that_is_killed(on_postgres, postgres, table, phases, request):
    database = Victim(
        "PostgreSQL", lambda service: _processes(postgres), False, lambda service: postgres.ensure_postgres_running()
    )
    job = survives(on_postgres, table, f"database-{request.node.callspec.id}", [(phase, [database]) for phase in phases])
    assert job["attempt"] == 1
