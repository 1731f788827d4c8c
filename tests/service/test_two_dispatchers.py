"""Two dispatchers on one store, as while a service is replaced by its next version: every job is started once."""

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from serve_app.cluster import DISPATCHER, actor_name
from serve_app.deployment import have_dispatcher
from serve_app.dispatcher import Dispatcher
from serve_app.lifecycle import FINAL, Status
from serve_app.settings import Settings
from serve_app.store.jobs import JobStore
from serve_app.store.tables import leases
from tests.conftest import DOCUMENTED, TINY, postgres_server, with_fields
from train_loop.spec import JobSpec

pytestmark = pytest.mark.service
NUM_JOBS = 8  # before the lease goes over, four of them at once, and half as many after it
PATIENCE_S = 240


def until(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.2)


@pytest.fixture
def store(tmp_path, mirror, monkeypatch):
    """A PostgreSQL, as a service of more than one machine has it, and a Ray of this test's own whose processes know it."""
    import ray

    with postgres_server() as server:
        url = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
        own = {"HOME": tmp_path, "DATABASE_URL": url, "MODEL_MIRROR": mirror, "EMBEDDED": "true", "HUB_OFFLINE": "true"}
        for name, value in (own | {"MAX_RUNNING_JOBS": "4"}).items():
            monkeypatch.setenv(f"TUNEYARD_{name}", str(value))
        settings = Settings.load()
        settings.prepare_embedded_keys()
        store = JobStore.open(url)
        store.migrate()
        ray.init("local", num_cpus=4, namespace=settings.ray_namespace, include_dashboard=False, log_to_driver=False)
        try:
            yield store
        finally:
            ray.shutdown()
            store.engine.dispose()


def _start(name):
    """A dispatcher's process."""
    import ray

    before = set(_pids())
    actor = (
        ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=4)(Dispatcher).options(name=name, lifetime="detached").remote()
    )
    assert ray.get(actor.ping.remote())
    [pid] = set(_pids()) - before
    return psutil.Process(pid)


def _pids():
    children = psutil.Process().children(recursive=True)
    return [p.pid for p in children if p.is_running() and p.cmdline()[:1] and p.cmdline()[0].startswith("ray::Dispatcher")]


def _leader(store):
    with store.read() as tx:
        return tx.execute(leases.select()).one_or_none()


def test_jobs_are_started_once_while_the_lease_goes_from_one_dispatcher_to_another_and_the_first_wakes_up(store, tmp_path):
    from ray._private import state

    first = _start("dispatcher-old")
    until(lambda: _leader(store) is not None, "a dispatcher leads")
    old = _leader(store)
    _start("dispatcher-new")
    where = {"dataset_path": str(tmp_path / "missing.jsonl"), "source_type": "local", "ownership": "public"}
    changes = {
        "dataset_details": where,
        "model_details.base_model": TINY,
        "infra_config.gpu_count": 1,
        "infra_config.node_count": 1,
    }

    def submit(numbers):
        specs = [with_fields(DOCUMENTED, changes | {"experiment_name": f"job-{i}"}) for i in numbers]
        return [store.insert(JobSpec.model_validate(spec), "queued")[0].request_id for spec in specs]

    def ended(ids):
        return [job for r in ids if (job := store.get(r)).status in FINAL]

    ids = submit(range(NUM_JOBS))
    until(lambda: len(ended(ids)) >= 2, "some jobs have run")
    first.suspend()
    until(lambda: _leader(store).owner != old.owner, "the other one leads")
    first.resume()  # it may be in the middle of a pass, and thinks that it leads
    more = submit(range(NUM_JOBS, NUM_JOBS + NUM_JOBS // 2))
    until(lambda: len(ended(ids + more)) == len(ids + more), "all jobs have ended")
    assert _leader(store).epoch == old.epoch + 1
    for request_id in ids + more:
        job, kinds = store.get(request_id), [e.kind for e in store.journal.events(request_id)]
        assert (job.status, job.error_code, job.attempt) == (Status.FAILED, "object_not_found", 1), (job.message, kinds)
        assert kinds.count("started") == 1
    made = Counter(a["Name"] for a in state.actors().values() if a["ActorClassName"] == "JobActor")
    assert made == {actor_name(request_id, 1): 1 for request_id in ids + more}


def test_a_newer_deployment_puts_its_dispatcher_in_the_place_of_an_older_one_and_never_the_reverse(store):
    import ray

    def after(deployment):
        # As replicas of one deployment do it, all at once.
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda _: have_dispatcher("tuneyard", deployment), range(3)))
        dispatcher = ray.get_actor(DISPATCHER, namespace="tuneyard")
        deployment = ray.get(dispatcher.deployment.remote())
        until(lambda: len(_pids()) == 1, "it alone is there")
        return dispatcher, deployment

    first, deployment = after(2)
    assert deployment == 2
    assert after(1) == after(2) == (first, 2)
    second, deployment = after(3)
    assert (second == first, deployment) == (False, 3)
    until(lambda: _leader(store) is not None, "it leads")
