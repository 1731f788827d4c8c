"""Single passes of the dispatcher over a simulated cluster: what it does, and what it tells."""

import datetime as dt
from pathlib import Path

import pytest
import sqlalchemy as sa

from serve_app.cluster import Growth
from serve_app.dispatcher import LEFTOVERS_S, START_S, UNPLACEABLE_S, Passes
from serve_app.lifecycle import Status
from serve_app.settings import Profile, Settings
from serve_app.store import pauses
from serve_app.store.audit import By
from serve_app.store.jobs import JobStore
from serve_app.store.quotas import Quota, set_quota
from serve_app.store.tables import metadata
from tests.conftest import DOCUMENTED, ORG, with_fields
from tests.serve_app.simulated import GPUS, SimCluster, World
from train_loop.errors import Cause
from train_loop.spec import JobSpec


class Bench:
    """A dispatcher, its store and its world."""

    def __init__(self, max_workers=None, autoscales=True, **settings):
        engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
        metadata.create_all(engine)
        self.world = World()
        self.store = JobStore(engine, self.world.clock)
        h100 = Profile(resources={"GPU": 1}, max_workers=max_workers)
        config = {"profiles": {"h100": h100}, "cancel_grace_s": 20, "autoscales": autoscales} | settings
        self.config = Settings(home=Path("/nonexistent"), **config)
        self.restart()

    def restart(self):
        """Another dispatcher, which knows nothing of what the one before did."""
        self.passes = Passes(self.config, self.store, SimCluster(self.world), self.world.clock, self.world.awake_s)

    def submit(self, name="job", nodes=1, **infra):
        infra = {"gpu_type": "h100", "gpu_count": GPUS, "node_count": nodes} | infra
        spec = with_fields(DOCUMENTED, {"experiment_name": name, "infra_config": infra})
        return self.store.insert(JobSpec.model_validate(spec), "queued")[0].request_id

    def later(self, seconds):
        self.world.later(seconds)

    def pause(self, drains=False):
        with self.store.write() as tx:
            pauses.begin(tx, By("admin:me"), drains=drains)

    def unpause(self):
        with self.store.write() as tx:
            assert pauses.end(tx)

    def kinds(self, request_id):
        return [e.kind for e in self.store.journal.events(request_id)]

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


def test_a_job_of_higher_priority_has_its_turn_before_those_that_came_earlier(bench):
    bench.submit("runs", nodes=2)
    bench.passes.run()
    first, urgent = bench.submit("first"), bench.submit("urgent", priority=5)
    bench.passes.run()
    assert [bench.job(r).queue_position for r in (first, urgent)] == [2, 1]


def test_a_machine_that_will_be_taken_back_gets_no_new_work(bench):
    bench.world.draining = {"node-0"}
    large, small = bench.submit("a", nodes=2), bench.submit("b")
    bench.passes.run()
    assert set(bench.world.actors) == {(small, 1)}
    bench.world.draining = set()
    bench.store.finish(small, 1, Status.COMPLETED, message="done")
    bench.world.actors.clear()
    bench.passes.run()
    assert set(bench.world.actors) == {(large, 1)}


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
    bench.passes.run()  # by now all that it held is free
    job = bench.job(elastic)
    assert (job.attempt, job.num_nodes, job.faults) == (2, 1, 0)
    assert [e.kind for e in bench.store.journal.events(elastic)] == ["queued", "started", "node_lost", "started"]


def test_an_elastic_job_does_not_go_on_smaller_because_what_it_held_is_free_node_by_node(bench):
    elastic = bench.submit(nodes=2, min_node_count=1)
    bench.passes.run()
    bench.world.actors.clear()
    bench.store.record_fault(elastic, 1, Cause.WORKER_DIED, "died.")
    bench.world.others = [0, GPUS]  # its own workers' room, a moment after they are gone
    bench.passes.run()
    bench.world.others = [0, 0]
    bench.passes.run()
    assert (bench.job(elastic).attempt, bench.job(elastic).num_nodes) == (2, 2)


def test_no_attempt_waits_for_a_machine_that_is_lost_and_not_missed_yet(bench):
    elastic = bench.submit(nodes=2, min_node_count=1)
    bench.passes.run()
    bench.world.silent = {"node-1"}
    bench.world.actors.clear()
    bench.store.record_fault(elastic, 1, Cause.NODE_LOST, "gone.")
    bench.passes.run()
    bench.passes.run()
    assert (bench.job(elastic).attempt, bench.job(elastic).num_nodes) == (2, 1)
    next_ = bench.submit("b")
    bench.passes.run()
    assert bench.job(next_).status is Status.QUEUED  # it isn't forgotten in the pass after
    bench.world.silent = set()
    bench.passes.run()
    assert bench.job(next_).status is Status.RUNNING


@pytest.mark.parametrize("phase", ["preparing_data", "waiting_for_resources", "training"])
def test_a_job_waits_for_what_others_hold_of_the_cluster_and_starts_once_it_is_free(bench, phase):
    bench.world.others = [GPUS, 0]
    small = bench.submit("a", gpu_count=1)
    bench.passes.run()
    bench.store.report(small, 1, phase=phase)
    if phase == "training":
        assert bench.world.place((small, 1), 1)
    large = bench.submit("b")
    bench.passes.run()
    assert set(bench.world.actors) == {(small, 1)}
    bench.world.others = [GPUS - 1, 0]
    bench.passes.run()
    assert set(bench.world.actors) == {(small, 1), (large, 1)}


def test_machines_are_asked_for_beyond_those_that_others_hold(bench):
    bench.world.others = [GPUS, 1]
    bench.submit("a")
    bench.passes.run()
    assert bench.world.asked == [{"GPU": float(GPUS)}, {"GPU": 1.0}, *[{"GPU": 1.0}] * GPUS]


def test_a_job_without_room_is_back_in_the_queue_and_tried_again_after_a_while(bench):
    request_id = bench.submit(max_retries=0)
    waiting_since, tries = bench.job(request_id).waiting_since, 0
    for _ in range(100):
        bench.passes.run()
        job = bench.job(request_id)
        if job.open:
            tries += 1
            bench.world.actors.clear()
            bench.store.record_fault(request_id, job.attempt, Cause.NO_ROOM, "The cluster had no room for 2 workers.")
        bench.later(2)
    job = bench.job(request_id)
    assert (job.status, job.faults, job.losses, job.waiting_since) == (Status.RUNNING, 0, 0, waiting_since)
    assert 5 <= tries <= 8  # in 200 s


def test_a_job_waits_for_machines_where_some_may_come(bench):
    huge = bench.submit(nodes=50)
    for _ in range(3):
        bench.passes.run()
        bench.later(UNPLACEABLE_S)
    assert bench.job(huge).status is Status.QUEUED
    assert len(bench.world.asked) == 50 * GPUS
    assert bench.store.capacity() == {}


@pytest.mark.parametrize("limits", [{"max_workers": 4}, {"autoscales": False}, {"max_gpus_per_org": 4}])
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
    assert job.error_message == "The job needs 100 workers of h100; it can have 4 here, by the cluster's size or its limits."


def test_a_job_the_autoscaler_can_not_make_room_for_fails_with_the_reason(bench):
    bench.world.growth = Growth([({"GPU": 8.0}, 3), ({"CPU": 64.0}, 100)], max_nodes=50)
    fits, huge = bench.submit("a", nodes=12), bench.submit("b", nodes=13)
    for _ in range(3):
        bench.passes.run()
        bench.later(UNPLACEABLE_S)
    assert bench.job(fits).status is Status.QUEUED
    assert (bench.job(huge).error_code, "can have 24 here" in bench.job(huge).error_message) == ("too_large", True)
    assert bench.store.capacity() == {"h100": 24}


def test_room_on_nodes_to_come_is_counted_within_all_limits():
    growth = Growth([({"GPU": 8.0}, 3), ({"GPU": 4.0, "accelerator_type:A100": 1.0}, 10)], max_nodes=5)
    assert growth.count({"GPU": 1.0}) == 3 * 8 + 2 * 4
    assert growth.count({"GPU": 3.0}) == 3 * 2 + 2 * 1
    assert growth.count({"GPU": 1.0, "accelerator_type:A100": 0.001}) == 3 * 8 + 2 * 4  # the first kind doesn't say what it has
    assert growth.count({"GPU": 1.0, "accelerator_type:H100": 0.001}) == 3 * 8


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


def test_an_attempt_that_was_opened_long_ago_by_a_dispatcher_that_died_is_started(bench):
    job = bench.submit()
    bench.store.start_attempt(job, 0, 1)
    bench.later(10 * START_S)  # nobody led meanwhile
    bench.restart()
    bench.passes.run()
    assert (set(bench.world.actors), bench.job(job).faults) == ({(job, 1)}, 0)


def test_a_laptop_that_slept_does_not_take_its_actors_for_silent(bench):
    job = bench.submit()
    bench.passes.run()
    bench.store.report(job, 1, phase="training")
    bench.world.now += dt.timedelta(hours=8)  # nobody was awake
    bench.passes.run()
    assert set(bench.world.actors) == {(job, 1)}
    bench.later(100)  # awake, and silent
    bench.passes.run()
    assert bench.world.actors == {}


def test_a_job_started_by_another_dispatcher_meanwhile_is_not_taken_for_dead(bench):
    job = bench.submit()
    cluster, attempts = bench.passes.cluster, bench.passes.cluster.attempts

    def while_another_one_starts_it():
        found = attempts()
        started = bench.store.start_attempt(job, 0, 1)
        if started is not None:
            cluster.start(started)
            bench.store.report(job, 1, phase="training")
        return found

    cluster.attempts = while_another_one_starts_it
    bench.passes.run()
    assert (bench.job(job).attempt, bench.job(job).faults) == (1, 0)


def test_a_job_that_can_not_be_seen_to_holds_nobody_up(bench):
    broken, fine = bench.submit("a"), bench.submit("b")
    bench.passes.run()
    cluster, end = bench.passes.cluster, bench.passes.cluster.end

    def ended(attempt):
        if attempt[0] == broken:
            raise RuntimeError("no such thing")
        end(attempt)

    cluster.end = ended
    for job in (broken, fine):
        bench.store.report(job, 1, phase="preparing_data")
        bench.store.request_cancel(job)
    bench.passes.run()
    assert set(bench.world.actors) == {(broken, 1)}


def test_what_a_dispatcher_asked_the_autoscaler_for_is_taken_back_by_the_next_one(bench):
    bench.submit("a", nodes=3)
    bench.passes.run()
    assert bench.world.asked == [{"GPU": 1.0}] * 3 * GPUS
    for job in bench.store.waiting(10):
        bench.store.request_cancel(job.request_id)
    bench.restart()
    bench.passes.run()
    assert bench.world.asked == []


def test_no_machine_is_asked_for_that_the_limits_leave_idle():
    bench = Bench(max_running_jobs=10, max_gpus_per_org=2 * GPUS + GPUS)
    bench.submit("a", nodes=2)
    bench.submit("elastic", nodes=4, min_node_count=1)
    bench.passes.run()
    assert bench.world.asked == [{"GPU": 1.0}] * 3 * GPUS  # what runs, and as much as the org may still have
    bench.submit("c", nodes=2)
    bench.passes.run()
    assert bench.world.asked == [{"GPU": 1.0}] * 3 * GPUS


def test_a_job_too_large_is_refused_however_busy_the_service_is():
    bench = Bench(autoscales=False, max_running_jobs=1)
    bench.submit("runs")
    bench.passes.run()
    huge = bench.submit("huge", nodes=50)
    bench.passes.run()
    bench.later(UNPLACEABLE_S + 1)
    bench.passes.run()
    assert bench.job(huge).error_code == "too_large"


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


def test_nothing_starts_while_the_operator_has_it_paused_and_what_runs_goes_on(bench):
    runs = bench.submit("a")
    bench.passes.run()
    retried = bench.submit("b")
    bench.passes.run()
    bench.pause()
    waits = bench.submit("c", nodes=2)
    del bench.world.actors[retried, 1]
    bench.store.record_fault(retried, 1, Cause.PREEMPTED, "gone.")
    for _ in range(3):
        bench.later(10)
        bench.store.report(runs, 1)
        bench.passes.run()
    assert set(bench.world.actors) == {(runs, 1)}
    assert bench.world.asked == []  # no machine is to come
    assert bench.store.start_attempt(waits, 0, 1) is None  # as a pass that began before would
    bench.unpause()
    bench.passes.run()
    assert set(bench.world.actors) == {(runs, 1), (retried, 2)}


def test_a_job_that_is_too_large_for_what_is_left_is_not_refused_during_a_pause():
    bench = Bench(autoscales=False)
    job = bench.submit(nodes=2)
    bench.pause()
    bench.world.nodes_up = 1
    for _ in range(3):
        bench.passes.run()
        bench.later(UNPLACEABLE_S)
    bench.unpause()
    bench.passes.run()
    assert bench.job(job).status is Status.QUEUED
    bench.world.nodes_up = 2
    bench.passes.run()
    assert bench.job(job).status is Status.RUNNING


@pytest.mark.parametrize("saves", [True, False])
def test_a_drain_sends_what_runs_back_to_its_place_and_it_goes_on_after_it(bench, saves):
    runs = bench.submit("a", nodes=2, max_retries=0)
    bench.passes.run()
    bench.later(1)
    bench.store.report(runs, 1, phase="training", step=7, ran_s=5.0)
    later = bench.submit("b", nodes=2)
    bench.pause(drains=True)
    bench.passes.run()
    assert bench.world.told_to_stop == {(runs, 1)}
    if saves:
        del bench.world.actors[runs, 1]
    else:
        bench.later(21)
        bench.passes.run()
    bench.world.stuck = 1
    bench.passes.run()
    assert bench.job(runs).status is Status.RUNNING  # something of it is left
    bench.world.stuck = 0
    for _ in range(3):
        bench.passes.run()
    job = bench.job(runs)
    assert (job.status, job.phase, job.faults, job.attempt, job.step) == (Status.QUEUED, "queued", 0, 1, 7)
    assert bench.world.actors == {}
    bench.unpause()
    bench.passes.run()
    assert set(bench.world.actors) == {(runs, 2)}
    assert bench.job(later).queue_position == 1
    assert bench.kinds(runs) == ["queued", "started", "yield_requested", "requeued", "started"]
    assert bench.job(runs).ran_s == 5.0


def test_a_drain_that_is_called_off_makes_no_fault_of_a_run_that_stops_because_of_it(bench):
    runs = bench.submit(max_retries=0)
    bench.passes.run()
    bench.store.report(runs, 1, phase="training", step=1)
    bench.pause(drains=True)
    bench.passes.run()
    bench.unpause()
    bench.restart()
    bench.passes.run()
    del bench.world.actors[runs, 1]
    for _ in range(2):
        bench.passes.run()
    assert (bench.job(runs).attempt, bench.job(runs).faults) == (2, 0)
    assert bench.kinds(runs)[-2:] == ["requeued", "started"]


def test_a_job_between_two_attempts_is_back_in_the_queue_after_a_drain_too(bench):
    job = bench.submit()
    bench.passes.run()
    bench.world.actors.clear()
    bench.store.record_fault(job, 1, Cause.WORKER_DIED, "died.")
    bench.pause(drains=True)
    bench.passes.run()
    assert (bench.job(job).status, bench.job(job).retry_at, bench.job(job).faults) == (Status.QUEUED, None, 1)


def test_a_wish_to_cancel_comes_before_one_to_yield(bench):
    job = bench.submit()
    bench.passes.run()
    bench.store.report(job, 1, phase="training", step=1)
    bench.pause(drains=True)
    bench.passes.run()
    bench.store.request_cancel(job)
    bench.world.actors.clear()
    bench.passes.run()
    assert bench.job(job).status is Status.CANCELED


def test_a_requeued_job_starts_again_by_itself(bench):
    job = bench.submit(max_retries=0)
    bench.passes.run()
    bench.store.report(job, 1, phase="training", step=1)
    bench.store.ask_to_yield(job, 1, "asked")
    bench.passes.run()
    assert bench.world.told_to_stop == {(job, 1)}
    bench.world.actors.clear()
    bench.passes.run()
    assert set(bench.world.actors) == {(job, 2)}
    assert (bench.job(job).faults, bench.job(job).yield_requested_at) == (0, None)


def test_an_org_s_own_quota_counts_from_the_next_pass_on():
    bench = Bench(max_running_jobs=10, max_gpus_per_org=GPUS, autoscales=False)
    first, second = bench.submit("a"), bench.submit("b")
    huge = bench.submit("c", nodes=2)
    bench.passes.run()
    assert set(bench.world.actors) == {(first, 1)}
    with bench.store.write() as tx:
        set_quota(tx, ORG, Quota(max_gpus=2 * GPUS))
    for _ in range(3):
        bench.passes.run()
        bench.later(UNPLACEABLE_S)
        for running in bench.store.running():
            bench.store.report(running.request_id, running.attempt)
    assert set(bench.world.actors) == {(first, 1), (second, 1)}
    assert bench.job(huge).status is Status.QUEUED  # by the settings it would be too large
    bench.store.finish(first, 1, Status.COMPLETED, message="done")
    bench.store.finish(second, 1, Status.COMPLETED, message="done")
    bench.world.actors.clear()
    with bench.store.write() as tx:
        set_quota(tx, ORG, Quota(max_gpus=2 * GPUS, max_running_jobs=1))
    small = bench.submit("d", gpu_count=1)
    bench.passes.run()
    assert set(bench.world.actors) == {(huge, 1)}
    assert bench.job(small).status is Status.QUEUED
