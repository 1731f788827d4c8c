"""The list of a job's files, from a real S3 that is away or comes and goes."""

import signal
import time

import pytest
from starlette.testclient import TestClient

from serve_app.app import build_app
from serve_app.embedded.s3 import BUCKET
from tests.conftest import DOCUMENTED, ORG, Idle
from train_loop.spec import JobSpec

GIVEN_UP_S = 30  # with the patience of a training run it would be minutes


@pytest.fixture
def ask(settings, store, http):
    """Ask for a job's files where the storage has this endpoint and these keys."""
    request_id = store.insert(JobSpec.model_validate(DOCUMENTED), "queued")[0].request_id

    def asked(endpoint_url, s3):
        storage = {
            "storage_uri": f"s3://{BUCKET}/runs",
            "storage_endpoint_url": endpoint_url,
            "storage_access_key_id": s3.access_key_id,
            "storage_secret_access_key": s3.secret_access_key,
        }
        here = type(settings).model_validate(settings.model_dump() | storage)
        with TestClient(build_app(here, store, Idle()), headers=http.headers) as client:
            began = time.monotonic()
            answers = [
                client.get(path)
                for path in (f"/job/{request_id}/artifacts", f"/job/artifacts/?org_id={ORG}&request_id={request_id}")
            ]
            assert time.monotonic() - began < GIVEN_UP_S
        assert len({(a.status_code, a.text) for a in answers}) == 1
        return answers[0]

    return asked


def assert_away(answer):
    assert answer.status_code == 503, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert int(answer.headers["Retry-After"]) > 0
    assert "object storage" in answer.json()["detail"]


def test_a_storage_that_refuses_connections_is_503(ask, s3):
    assert_away(ask("http://127.0.0.1:9", s3))


def test_a_storage_that_hangs_is_503_in_seconds_and_works_again_afterwards(ask, s3):
    assert ask(s3.endpoint_url, s3).json() == {"files": []}
    s3.process.send_signal(signal.SIGSTOP)
    try:
        assert_away(ask(s3.endpoint_url, s3))
    finally:
        s3.process.send_signal(signal.SIGCONT)
    assert ask(s3.endpoint_url, s3).json() == {"files": []}
