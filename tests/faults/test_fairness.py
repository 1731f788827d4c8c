"""Several orgs on a small cluster: nobody's jobs wait for all of another org's, and over time each has as much of it."""

import datetime as dt
import http.server
import time
import uuid
from collections import Counter

import pytest

from serve_app.client import Client
from serve_app.store.jobs import utc_now
from tests.faults.conftest import SETTINGS
from tests.faults.harness import Service
from tests.running import DATASETS

pytestmark = [pytest.mark.faults, pytest.mark.faults_full]
NUM_ORGS, JOBS_EACH = 10, 5
LENGTHS_S = (8, 4, 2)  # of the jobs of each of three orgs
MANY, AT_ONCE = 50, 4
WATCHED_S = 180.0  # in which an org may come to have one job's length more than another: a twentieth of what is fair


class Slow(http.server.BaseHTTPRequestHandler):
    """An object storage without any object, which takes as many seconds to say so as the path has in it."""

    def do_HEAD(self) -> None:
        _, mark, seconds = self.path.rpartition("-")
        if mark:  # else it is the bucket that is asked about
            time.sleep(float(seconds))
        self._nothing()

    def do_GET(self) -> None:
        self._nothing()

    def _nothing(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def for_few(tmp_path_factory, mirror):
    """A service that has room for a few workers only."""
    few = {"TUNEYARD_MAX_WORKERS": str(AT_ONCE)}
    with Service(tmp_path_factory.mktemp("fair"), mirror, **SETTINGS, **few).up_with_data() as running:
        yield running


def _queue(service, org, count, path, **keys):
    """Submit jobs of an org that end as soon as they see that they have no data; their ids and the org's client."""
    client = Client(service.up["url"], service.run("token", "--org", org).stdout.strip())
    secret_id = client.create_secret(org, "keys", "s3", service.keys | keys)["secret_id"]
    changes = {"dataset_details.dataset_path": path, "dataset_details.secret_id": secret_id}
    jobs = [service.job(f"fair-{i}", changes) | {"org": org} for i in range(count)]
    return [client.submit(job)["request_id"] for job in jobs], client


def test_fifty_jobs_of_ten_orgs_start_in_turns(service):
    orgs = [str(uuid.uuid4()) for _ in range(NUM_ORGS)]
    with service.held():  # the worst order: each org queues all it has before the next one comes
        queued = {org: _queue(service, org, JOBS_EACH, f"s3://{DATASETS}/missing.jsonl") for org in orgs}
    ended = [service.wait(r, client=client, org=org) for org, (ids, client) in queued.items() for r in ids]
    assert {(job["error_code"], job["attempt"]) for job in ended} == {("object_not_found", 1)}
    started = [job["org"] for job in sorted(ended, key=lambda job: job["started_at"])]
    for count in range(NUM_ORGS, len(started) + 1, NUM_ORGS):
        had = Counter(started[:count])
        assert all(abs(had[org] - count / NUM_ORGS) <= 1 for org in orgs), had


def test_orgs_with_longer_and_shorter_jobs_have_the_same_worker_seconds(for_few, serve):
    """Taking turns by jobs, the first org would have nearly twice as many as the last."""
    url = serve(Slow)
    with for_few.held():
        queued = [_queue(for_few, str(uuid.uuid4()), MANY, f"s3://slow/for-{seconds}", endpoint_url=url) for seconds in LENGTHS_S]
    time.sleep(WATCHED_S)
    until = utc_now()
    had = []
    for ids, _ in queued:
        jobs = [for_few.store.get(request_id) for request_id in ids]
        assert any(job.started_at is None for job in jobs), "an org had nothing left to run"
        spans = [(job.completed_at or until) - job.started_at for job in jobs if job.started_at]
        had.append(sum(spans, dt.timedelta()).total_seconds())  # each has one worker
    for ids, client in queued:
        for request_id in ids:
            if for_few.store.get(request_id).status == "QUEUED":
                client.cancel(request_id, for_few.store.get(request_id).org_id)
    fair = sum(had) / len(had)
    assert fair > 0.6 * AT_ONCE * WATCHED_S / len(had), had  # the workers weren't idle
    assert all(abs(seconds - fair) < 0.1 * fair for seconds in had), had
