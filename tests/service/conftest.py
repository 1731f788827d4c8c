"""One embedded service that most tests of this folder share."""

import json
import shutil

import pytest

from tests.conftest import rows, serving
from tests.observed import DASHBOARDS, Spans
from tests.running import DATASETS, Running


def pytest_collection_modifyitems(items):
    """What shares the service comes last, so that the service isn't there beside the others."""
    items.sort(key=lambda item: "service" in item.fixturenames)


@pytest.fixture(scope="session")
def spans():
    """The traces of all jobs of the service."""
    collected = Spans()
    with serving() as start:
        collected.url = start(collected.handler())
        yield collected


@pytest.fixture(scope="session")
def boards(tmp_path_factory):
    """A folder with our dashboards, into which Ray is told to write its own."""
    folder = tmp_path_factory.mktemp("dashboards")
    for dashboard in DASHBOARDS:
        shutil.copy(dashboard, folder)
    return folder


@pytest.fixture(scope="session")
def service(tmp_path_factory, mirror, spans, boards):
    watched = {"OTEL_EXPORTER_OTLP_ENDPOINT": spans.url, "OTEL_BSP_SCHEDULE_DELAY": "500"}
    watched |= {"RAY_metrics_report_interval_ms": "5000", "RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR": str(boards)}
    running = Running(tmp_path_factory.mktemp("home"), mirror, TUNEYARD_READY_WORKERS="2", **watched)
    running.start()
    s3 = running.s3()
    s3.create_bucket(Bucket=DATASETS)
    lines = [json.dumps(r) for r in rows(60)]
    lines.insert(10, "{broken")
    s3.put_object(Bucket=DATASETS, Key="rows.jsonl", Body="\n".join(lines).encode())
    s3.put_object(Bucket=DATASETS, Key="empty.jsonl", Body=b"")
    s3.put_object(Bucket=DATASETS, Key="unusable.jsonl", Body=b'{"text": "no conversation"}\n' * 5)
    yield running
    running.down()
