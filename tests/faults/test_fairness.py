"""Several orgs on a small cluster: nobody's jobs wait for all of another org's, and over time each has as much of it."""

import http.server
import re
import time
import uuid
from collections import Counter
from itertools import pairwise

import pytest

from serve_app.auth import mint_token
from serve_app.client import Client
from serve_app.scheduler import LEAST_S
from serve_app.settings import Settings
from serve_app.store.jobs import utc_now
from tests.faults.conftest import SETTINGS
from tests.faults.harness import Service
from tests.running import DATASETS

pytestmark = pytest.mark.faults
LENGTHS_S = (20, 15, 12)  # of the jobs of each of three orgs; none is so short that its start counts for more
MANY, AT_ONCE = 30, 4
ENOUGH = 8  # longest jobs that each org should have had; it may have had half of one more or less than is fair
WATCHED_S = 900.0


class Slow(http.server.BaseHTTPRequestHandler):
    """An object storage without any object, which takes as many seconds to say so as the path has in it.

    A job asks twice about a path, so each answer takes half of them: no request may be without an answer for 20 s.
    """

    def do_HEAD(self) -> None:
        self._nothing()

    def do_GET(self) -> None:
        self._nothing()

    def _nothing(self) -> None:
        if found := re.search(r"for-(\d+)", self.path):  # else it is the bucket that is asked about
            time.sleep(int(found[1]) / 2)
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def for_few(tmp_path_factory, mirror):
    """A service that has room for a few workers only."""
    few = {"TUNEYARD_MAX_WORKERS": str(AT_ONCE), "TUNEYARD_MAX_RUNNING_JOBS": str(AT_ONCE)}
    with Service(tmp_path_factory.mktemp("fair"), mirror, **SETTINGS, **few).up_with_data() as running:
        yield running


def _queue(service, org, count, path, **keys):
    """Submit jobs of an org that end as soon as they see that they have no data; their ids and the org's client."""
    client = Client(service.up["url"], mint_token(Settings(home=service.home), org, "tester", 3600))
    secret_id = client.create_secret(org, "keys", "s3", service.keys | keys)["secret_id"]
    changes = {"dataset_details.dataset_path": path, "dataset_details.secret_id": secret_id}
    jobs = [service.job(f"fair-{i}", changes) | {"org": org} for i in range(count)]
    return [client.submit(job)["request_id"] for job in jobs], client


@pytest.mark.parametrize(("num_orgs", "jobs_each"), [(3, 3), pytest.param(10, 5, marks=pytest.mark.faults_full)])
def test_jobs_of_several_orgs_start_in_turns(service, num_orgs, jobs_each):
    """Each ends at once; what is left of a machine's haste and delays counts for less than a start does."""
    orgs = [str(uuid.uuid4()) for _ in range(num_orgs)]
    with service.held():  # the worst order: each org queues all it has before the next one comes
        queued = {org: _queue(service, org, jobs_each, f"s3://{DATASETS}/missing.jsonl") for org in orgs}
    ended = [service.wait(r, client=client, org=org) for org, (ids, client) in queued.items() for r in ids]
    assert {(job["error_code"], job["attempt"]) for job in ended} == {("object_not_found", 1)}
    started = [job["org"] for job in sorted(ended, key=lambda job: job["started_at"])]
    for count in range(num_orgs, len(started) + 1, num_orgs):
        had = Counter(started[:count])
        assert all(abs(had[org] - count / num_orgs) <= 1 for org in orgs), had


def _lasted_s(jobs):
    """Of those that have started, for how long each had its one worker by now."""
    now = utc_now()
    return [((job.completed_at or now) - job.started_at).total_seconds() for job in jobs if job.started_at]


def _at_work(jobs):
    """How many ran each time that the dispatcher had started some, and another one ended after that."""
    changes = [(job.started_at, 1) for job in jobs if job.started_at] + [
        (job.completed_at, -1) for job in jobs if job.completed_at
    ]
    running, found = 0, []
    for (_, change), (_, following) in pairwise(sorted(changes)):
        running += change
        if change > following:
            found.append(running)
    return found


@pytest.mark.timeout(WATCHED_S + 300)
@pytest.mark.faults_full
def test_orgs_with_longer_and_shorter_jobs_have_the_same_worker_seconds(for_few, serve):
    """Taking turns by jobs, the first org would have more than half as many again as the last."""
    assert min(LENGTHS_S) > LEAST_S
    url, store = serve(Slow), for_few.store
    with for_few.held():
        queued = [_queue(for_few, str(uuid.uuid4()), MANY, f"s3://slow/for-{seconds}", endpoint_url=url) for seconds in LENGTHS_S]
    deadline, fair, longest = time.monotonic() + WATCHED_S, 0.0, 1.0
    while fair < ENOUGH * longest:
        assert time.monotonic() < deadline, "too few jobs have run"
        time.sleep(2)
        jobs = [[store.get(request_id) for request_id in ids] for ids, _ in queued]
        assert all(any(job.started_at is None for job in of) for of in jobs), "an org has nothing left to run"
        had = [sum(_lasted_s(of)) for of in jobs]
        fair, longest = sum(had) / len(had), max((s for of in jobs for s in _lasted_s(of)), default=1.0)
    for ids, client in queued:
        for request_id in ids:
            if store.get(request_id).status == "QUEUED":
                client.cancel(request_id, store.get(request_id).org_id)
    assert all(abs(seconds - fair) < 0.1 * fair for seconds in had), had
    # However slow the machine is: as long as jobs wait, nothing is left idle by the dispatcher when it has started some.
    at_work = _at_work([job for of in jobs for job in of])
    assert sum(count == AT_ONCE for count in at_work) > len(at_work) / 2, at_work
