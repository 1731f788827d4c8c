"""Ten orgs with five jobs each on a small cluster: nobody's jobs wait for all of another org's."""

import uuid
from collections import Counter

import pytest

from serve_app.client import Client
from tests.running import DATASETS

pytestmark = [pytest.mark.faults, pytest.mark.faults_full]
NUM_ORGS, JOBS_EACH = 10, 5


def test_fifty_jobs_of_ten_orgs_start_in_turns(service):
    """The jobs end as soon as they see that they have no data: what counts is the order in which they start."""
    orgs = [str(uuid.uuid4()) for _ in range(NUM_ORGS)]
    missing = {"dataset_details.dataset_path": f"s3://{DATASETS}/missing.jsonl"}
    clients = {org: Client(service.up["url"], service.run("token", "--org", org).stdout.strip()) for org in orgs}
    jobs = []
    with service.held():
        for org, client in clients.items():  # the worst order: each org queues all it has before the next one comes
            secret_id = client.create_secret(org, "keys", "s3", service.keys)["secret_id"]
            for i in range(JOBS_EACH):
                job = service.job(f"fair-{i}", missing | {"dataset_details.secret_id": secret_id})
                jobs.append((org, client.submit(job | {"org": org})["request_id"]))
    ended = [service.wait(request_id, client=clients[org], org=org) for org, request_id in jobs]
    assert {job["error_code"] for job in ended} == {"object_not_found"}
    started = [job["org"] for job in sorted(ended, key=lambda job: job["started_at"])]
    for count in range(NUM_ORGS, len(started) + 1, NUM_ORGS):
        had = Counter(started[:count])
        assert all(abs(had[org] - count / NUM_ORGS) <= 1 for org in orgs), had
