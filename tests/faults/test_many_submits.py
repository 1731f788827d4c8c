"""Submissions under fire: each is one job, whatever dies while it is sent."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from serve_app.client import Client
from tests.conftest import ORG
from tests.faults.harness import INGRESS

pytestmark = pytest.mark.faults
NUM_JOBS = 1000
NUM_CLIENTS = 50
KILLS = 3


def test_a_thousand_concurrent_submissions_are_a_thousand_jobs_while_the_ingress_is_killed(service):
    done = threading.Event()
    kills = 0

    def shoot() -> None:
        nonlocal kills
        while not done.is_set() and kills < KILLS:
            kills += INGRESS.kill(service)
            while not service.ready() and not done.wait(0.1):
                pass

    def submit(numbers: range) -> list[str]:
        with Client(service.up["url"], service.token) as client:
            return [client.submit(service.job(f"many-{i}"))["request_id"] for i in numbers]

    with service.held():
        shooter = threading.Thread(target=shoot)
        shooter.start()
        try:
            with ThreadPoolExecutor(NUM_CLIENTS) as pool:
                answered = list(pool.map(submit, [range(i, NUM_JOBS, NUM_CLIENTS) for i in range(NUM_CLIENTS)]))
        finally:
            done.set()
            shooter.join()
            queued = service.client.iter_jobs(ORG, status="QUEUED", page_size=500)
            made = {j["request_id"]: j["experiment_name"] for j in queued if j["experiment_name"].startswith("many-")}
            for request_id in made:  # also where something failed: the tests after this one need the room
                service.store.request_cancel(request_id)
        ids = [request_id for batch in answered for request_id in batch]
        assert kills >= 2
        assert len(set(ids)) == NUM_JOBS
        assert set(ids) == set(made)
        assert sorted(made.values()) == sorted(f"many-{i}" for i in range(NUM_JOBS))
