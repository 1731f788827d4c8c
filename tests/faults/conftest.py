"""One service that the tests of this folder shoot at, the undisturbed job to compare with, and the table at the end."""

import os
from pathlib import Path

import pytest

from tests.conftest import postgres_server
from tests.faults.harness import Row, Service, Table

TABLE = pytest.StashKey[Table]()
SETTINGS = {"TUNEYARD_RATE_LIMIT": "1000000/second", "TUNEYARD_MAX_QUEUED_JOBS_PER_ORG": "1000000"}


def pytest_configure(config):
    config.stash[TABLE] = Table()


@pytest.fixture(scope="session")
def shot_at(request):
    """Settings of a service whose processes are killed: with SETTINGS, and in CI with no processes kept ready.

    To have them ready for each attempt costs 5 s of CPU more than to start them when it begins, and 25 s each time that the
    service ends with them. The long suite has them, and the tests of whole jobs.
    """
    long = any(item.get_closest_marker("faults_full") for item in request.session.items)
    return SETTINGS if long else SETTINGS | {"TUNEYARD_READY_WORKERS": "0"}


@pytest.fixture(scope="session")
def service(tmp_path_factory, mirror, shot_at):
    with Service(tmp_path_factory.mktemp("faults"), mirror, **shot_at).up_with_data() as running:
        yield running


@pytest.fixture(scope="session")
def postgres():
    """A PostgreSQL that tests may stop and kill."""
    with postgres_server() as server:
        yield server
        server.ensure_postgres_running()


@pytest.fixture(scope="session")
def table_rows(pytestconfig) -> list[Row]:
    """Where results go that aren't held against the undisturbed one."""
    return pytestconfig.stash[TABLE].rows


@pytest.fixture(scope="session")
def table(pytestconfig, service) -> Table:
    """Where results go; it has the undisturbed one by then."""
    made = pytestconfig.stash[TABLE]
    made.undisturbed = service.result(service.finished(service.submit("undisturbed")))
    return made


def pytest_terminal_summary(terminalreporter, config):
    lines = config.stash[TABLE].lines()
    if not config.stash[TABLE].rows:
        return
    terminalreporter.section("what was killed, and what became of the job")
    terminalreporter.write("\n".join(lines) + "\n")
    if path := os.environ.get("TUNEYARD_FAULTS_TABLE"):
        Path(path).write_text("\n".join(lines) + "\n")
