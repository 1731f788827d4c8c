"""Single passes of the dispatcher over a simulated cluster: what it does, and what it tells."""

import datetime as dt
from pathlib import Path

import pytest
import sqlalchemy as sa

from serve_app.dispatcher import LEFTOVERS_S, START_S, UNPLACEABLE_S, Passes
from serve_app.lifecycle import Status
from serve_app.settings import Profile, Settings
from serve_app.store.jobs import JobStore
from serve_app.store.tables import metadata
from tests.conftest import DOCUMENTED, ORG, with_fields
from tests.serve_app.simulated import GPUS, SimCluster, World
from train_loop.errors import Cause
from train_loop.spec import JobSpec


class Bench:
    """A dispatcher, its store and its world."""

    def __init__(self, max_workers=None, autoscales=True):
        engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
        metadata.create_all(engine)
        self.world = World()
        self.store = JobStore(engine, self.world.clock)
        h100 = Profile(resources={"GPU": 1}, max_workers=max_workers)
        config = Settings(home=Path("/nonexistent"), profiles={"h100": h100}, cancel_grace_s=20, autoscales=autoscales)
        self.passes = Passes(config, self.store, SimCluster(self.world), self.world.clock)

    def submit(self, name="job", nodes=1, **infra):
        infra = {"gpu_type": "h100", "gpu_count": GPUS, "node_count": nodes} | infra
        spec = with_fields(DOCUMENTED, {"experiment_name": name, "infra_config": infra})
        return self.store.insert(JobSpec.model_validate(spec), "queued")[0].request_id

    def later(self, seconds):
        self.world.now += dt.timedelta(seconds=seconds)

    def job(self, request_id):
        return self.store.get(request_id)


@pytest.fixture
def bench():
    return Bench()


def test_a_gang_starts_whole_and_others_see_their_place(bench):
    large, next_, last = bench.submit("a", nodes=2), bench.submit("b"), bench.submit("c")
    bench.passes.run()
    assert set(bench.world.actors) == {(large, 1)}
    jobs = [bench.job(r) for r in (next_, last)]
    assert [(j.status, j.queue_position) for j in jobs] == [(Status.QUEUED, 1), (Status.QUEUED, 2)]
    assert bench.job(large).num_workers == 2 * GPUS
    bench.store.finish(large, 1, Status.COMPLETED, message="done")
    bench.world.actors.clear()
    bench.passes.run()
    assert set(bench.world.actors) == {(next_, 1), (last, 1)}


def test_the_autoscaler_is_shown_what_waits_and_nothing_once_it_runs(bench):
    bench.world.nodes_up = 1
    running, waits = bench.submit("a"), bench.submit("b")
    bench.passes.run()
    assert set(bench.world.actors) == {(running, 1)}
    assert bench.world.asked == [{"GPU": 1.0}] * 2 * GPUS  # those that run keep their room
    bench.world.nodes_up = 2
    bench.passes.run()
    assert (waits, 1) in bench.world.actors
    assert bench.world.asked == []


def test_an_elastic_job_goes_on_smaller_after_a_node_is_lost(bench):
    elastic = bench.submit(nodes=2, min_node_count=1, max_retries=0)
    bench.passes.run()
    bench.store.report(elastic, 1, step=3, actor_node="node-1")
    bench.world.actors.clear()
    bench.world.nodes_up = 1
    bench.later(1)
    bench.passes.run()
    job = bench.job(elastic)
    assert (job.attempt, job.num_nodes, job.faults) == (2, 1, 0)
    assert [e.kind for e in bench.store.journal.events(elastic)] == ["queued", "started", "node_lost", "started"]


def test_a_job_waits_for_machines_where_some_may_come(bench):
    huge = bench.submit(nodes=50)
    for _ in range(3):
        bench.passes.run()
        bench.later(UNPLACEABLE_S)
    assert bench.job(huge).status is Status.QUEUED
    assert len(bench.world.asked) == 50 * GPUS
    assert bench.store.capacity() == {}


@pytest.mark.parametrize("limits", [{"max_workers": 4}, {"autoscales": False}])
def test_a_job_no_cluster_can_hold_fails_with_the_reason_after_a_while(limits):
    bench = Bench(**limits)
    huge = bench.submit(nodes=50)
    bench.passes.run()
    bench.later(UNPLACEABLE_S / 2)
    bench.passes.run()
    assert bench.job(huge).status is Status.QUEUED  # a machine may be on its way back
    bench.later(UNPLACEABLE_S)
    bench.passes.run()
    job = bench.job(huge)
    assert (job.status, job.error_code) == (Status.FAILED, "too_large")
    assert job.error_message == "The job needs 100 workers of h100; this cluster and its autoscaler can have 4."


def test_the_ingress_is_told_what_the_cluster_can_have():
    for bench, most in ((Bench(max_workers=40), 40), (Bench(autoscales=False), 2 * GPUS)):
        bench.passes.run()
        assert bench.store.capacity() == {"h100": most}
        bench.world.nodes_up = 1  # for a while
        bench.later(60)
        bench.passes.run()
        assert bench.store.capacity() == {"h100": most}


def test_cancel_before_training_ends_the_run_at_once(bench):
    job = bench.submit()
    bench.passes.run()
    bench.store.report(job, 1, phase="loading_model")
    bench.store.request_cancel(job)
    bench.passes.run()
    assert bench.world.actors == {}
    bench.passes.run()
    assert bench.job(job).status is Status.CANCELED


def test_cancel_while_training_lets_the_run_save_and_ends_it_after_the_grace_period(bench):
    job = bench.submit()
    bench.passes.run()
    bench.store.report(job, 1, phase="training", step=2)
    bench.store.request_cancel(job)
    bench.passes.run()
    assert bench.world.told_to_stop == {(job, 1)}
    assert (job, 1) in bench.world.actors
    bench.later(21)
    bench.passes.run()
    assert bench.world.actors == {}
    bench.passes.run()
    assert (bench.job(job).status, "checkpoint" in bench.job(job).message) == (Status.CANCELED, True)


def test_canceled_is_said_once_nothing_is_left(bench):
    job = bench.submit()
    bench.passes.run()
    bench.store.request_cancel(job)
    bench.world.actors.clear()
    bench.world.stuck = 3
    bench.passes.run()
    assert bench.job(job).status is Status.RUNNING
    bench.later(LEFTOVERS_S + 1)  # a lost machine's processes never answer
    bench.passes.run()
    assert bench.job(job).status is Status.CANCELED


def test_an_actor_that_was_never_made_is_made_and_one_that_never_comes_is_a_fault(bench):
    job = bench.submit()
    bench.passes.run()
    bench.world.actors.clear()  # the dispatcher died before this took effect
    bench.passes.run()
    assert set(bench.world.actors) == {(job, 1)}
    bench.world.actors.clear()
    bench.later(START_S + 1)
    bench.passes.run()
    assert bench.job(job).attempt == 2


def test_a_silent_actor_is_ended_but_not_for_a_silence_of_the_store(bench):
    job = bench.submit()
    bench.passes.run()
    bench.store.report(job, 1, phase="training")
    bench.later(100)
    bench.passes.forget()  # as after the store couldn't be reached: nobody could write
    bench.passes.run()
    assert (job, 1) in bench.world.actors
    bench.later(100)
    bench.passes.run()
    assert bench.world.actors == {}
    bench.passes.run()
    assert (bench.job(job).attempt, bench.job(job).faults) == (2, 1)


def test_actors_nobody_stands_behind_are_ended(bench):
    bench.world.actors = {("00000000-0000-4000-8000-000000000000", 1): True}
    bench.passes.run()
    assert bench.world.actors == {}


def test_a_resumed_job_of_an_org_with_history_waits_for_an_org_without(bench):
    first = bench.submit("a", nodes=2)
    bench.passes.run()
    bench.store.report(first, 1, ran_s=1000.0)
    bench.store.finish(first, 1, Status.COMPLETED, message="done")
    bench.world.actors.clear()
    bench.submit("b", nodes=2)
    other = with_fields(DOCUMENTED, {"org": "99999999-2222-4333-8444-555555555555", "infra_config.gpu_type": "h100"})
    newcomer = bench.store.insert(JobSpec.model_validate(other), "queued")[0]
    assert newcomer.org_id != ORG
    bench.passes.forget()  # a restarted dispatcher knows the shares again from the store
    bench.passes.run()
    assert set(bench.world.actors) == {(newcomer.request_id, 1)}


def test_passes_come_soon_only_while_a_retry_waits_for_what_its_last_attempt_left(bench):
    request_id = bench.submit()
    assert bench.passes.run() is False
    bench.world.actors.clear()
    bench.store.record_fault(request_id, 1, Cause.WORKER_DIED, "died")
    bench.world.stuck = 1
    assert bench.passes.run() is True
    bench.world.stuck, bench.world.nodes_up = 0, 0
    bench.passes.run()
    assert bench.passes.run() is False  # nothing is left, and there is no room
    bench.world.nodes_up = 1
    bench.passes.run()
    assert set(bench.world.actors) == {(request_id, 2)}
    bench.world.actors.clear()
    bench.store.record_fault(request_id, 2, Cause.WORKER_DIED, "died")
    assert bench.job(request_id).retry_at > bench.world.now
    assert bench.passes.run() is False  # it waits longer this time
