"""What each org gets of the cluster, played through the real dispatcher's passes over a simulated cluster and its clock."""

import datetime as dt
import itertools
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import sqlalchemy as sa

from serve_app.dispatcher import POLL_S, Passes
from serve_app.lifecycle import Status
from serve_app.scheduler import LEAST_S
from serve_app.settings import Profile, Settings
from serve_app.store.jobs import JobStore
from serve_app.store.tables import metadata
from tests.conftest import DOCUMENTED, with_fields
from tests.serve_app.simulated import GPUS, NODES, SimCluster, World
from train_loop.errors import Cause
from train_loop.spec import JobSpec

ORGS = [f"{i:08d}-2222-4333-8444-555555555555" for i in range(10)]


class Play:
    """A cluster of four workers on which each job runs for as long as it was made to."""

    def __init__(self, engine):
        self.world = World()
        self.store = JobStore(engine, self.world.clock)
        self.lengths, self.starts, self.ends = {}, [], {}
        self.names = itertools.count()
        self.restart()

    def restart(self):
        """Another dispatcher, which knows of the one before what is in the store."""
        profile = Profile(resources={"GPU": 1})
        config = Settings(home=Path("/nonexistent"), profiles={"h100": profile}, heartbeat_timeout_s=1e6)
        self.passes = Passes(config, self.store, SimCluster(self.world), self.world.clock, self.world.awake_s)

    def submit(self, org, length_s, **infra):
        infra = {"gpu_type": "h100", "gpu_count": 1, "node_count": 1} | infra
        spec = with_fields(DOCUMENTED, {"experiment_name": f"job-{next(self.names)}", "org": org, "infra_config": infra})
        request_id = self.store.insert(JobSpec.model_validate(spec), "queued")[0].request_id
        self.lengths[request_id] = length_s
        return request_id

    def run_pass(self):
        """One pass; what it has started, in order."""
        before = set(self.world.actors)
        self.passes.run()
        began = [attempt for attempt in self.world.actors if attempt not in before]
        for request_id, attempt in began:
            self.ends[request_id, attempt] = self.world.seconds_awake + self.lengths[request_id]
            self.store.report(request_id, attempt)
        jobs = [self.store.get(request_id) for request_id, _ in began]
        self.starts += [job.org_id for job in jobs]
        return jobs

    def go_on(self, seconds):
        """Let time go by; jobs whose time it is end, as an actor writes it down."""
        until = self.world.seconds_awake + seconds
        for attempt, at in sorted(self.ends.items(), key=lambda found: found[1]):
            if at <= until:
                self.world.later(max(0.0, at - self.world.seconds_awake))
                self.end(attempt, lambda r, n: self.store.finish(r, n, Status.COMPLETED, message="done"))
        self.world.later(until - self.world.seconds_awake)

    def end(self, attempt, ending):
        """The attempt tells how long it ran, and ends like that."""
        self.world.actors.pop(attempt)
        self.ends.pop(attempt)
        job = self.store.get(attempt[0])
        ran_s = job.ran_s + (self.world.now - job.heartbeat_at).total_seconds()
        self.store.report(*attempt, ran_s=ran_s)
        ending(*attempt)

    def shares(self):
        """Worker-seconds of each org, as the dispatcher counts them."""
        return {org: self.passes._shares.of(org) for org in ORGS}


@pytest.fixture
def play():
    engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
    metadata.create_all(engine)
    return Play(engine)


@pytest.mark.parametrize("store", ["sqlite", "postgresql"], indirect=True)
@pytest.mark.parametrize("restarts", [False, True])
def test_fifty_jobs_of_ten_orgs_that_end_between_two_passes_start_in_turns(store, restarts):
    """One org queues all that it has before the next one comes; a job takes a second or so, and no pass sees it."""
    play = Play(store.engine)
    for number, org in enumerate(ORGS):
        for i in range(5):
            play.submit(org, 0.2 + 0.3 * ((number + 3 * i) % 5))
    while len(play.starts) < 50:
        assert play.run_pass()
        play.go_on(POLL_S)
        if restarts:
            play.restart()
    for count in range(10, 51, 10):
        had = Counter(play.starts[:count])
        assert all(abs(had[org] - count / 10) <= 1 for org in ORGS), had


@pytest.mark.parametrize("restarts", [False, True])
def test_orgs_with_jobs_of_any_length_have_the_same_worker_seconds(play, restarts):
    """Ten orgs on four workers, each with more waiting than it can have. By jobs, the last would have three times the first's."""
    had, waiting, began, every_s, passes = defaultdict(float), Counter(), [], 6.0, 200
    lengths = {org: 11.0 + 2.5 * number for number, org in enumerate(ORGS)}
    for passed in range(passes):
        for org in ORGS:
            while waiting[org] < 2:
                play.submit(org, lengths[org])
                waiting[org] += 1
        for job in play.run_pass():
            waiting[job.org_id] -= 1
            began.append(job.request_id)
        play.go_on(every_s)
        if restarts and passed % 40 == 20:
            for job in play.store.running():
                play.store.report(job.request_id, job.attempt, ran_s=(play.world.now - job.started_at).total_seconds())
            play.restart()
    for job in map(play.store.get, began):
        had[job.org_id] += ((job.completed_at or play.world.now) - job.started_at).total_seconds()
    fair = sum(had.values()) / len(ORGS)
    assert all(abs(had[org] - fair) < 0.1 * fair for org in ORGS), had
    assert sum(had.values()) > 0.75 * NODES * GPUS * passes * every_s  # a worker that is free waits for the next pass


def test_an_org_whose_jobs_all_end_at_once_leaves_the_others_their_share(play):
    """What its starts cost isn't the fraction of a second that each of them holds a worker for."""
    broken, fine, starts = ORGS[0], ORGS[1], Counter()
    for _ in range(150):
        for org, length_s in ((broken, 0.1), (fine, 30.0)):
            for _ in range(4 - len([job for job in play.store.waiting(9) if job.org_id == org])):
                play.submit(org, length_s)
        starts.update(job.org_id for job in play.run_pass())
        play.go_on(POLL_S)
    assert starts[broken] < 1.3 * starts[fine] * 30.0 / LEAST_S, starts
    assert starts[fine] * 30.0 > 0.4 * NODES * GPUS * 150 * POLL_S


def completes(play, request_id, attempt):
    play.store.finish(request_id, attempt, Status.COMPLETED, message="done")


def is_retried(play, request_id, attempt):
    play.store.record_fault(request_id, attempt, Cause.WORKER_DIED, "died.")


def is_given_back(play, request_id, attempt):
    play.store.ask_to_yield(request_id, attempt, "asked")
    play.store.give_back(request_id, attempt)


@pytest.mark.parametrize("ending", [completes, is_retried, is_given_back])
@pytest.mark.parametrize(("ran_s", "counts_s"), [(0.3, LEAST_S), (LEAST_S + 1.3, LEAST_S + 1.3), (95.0, 95.0)])
def test_an_attempt_counts_from_its_start_to_its_end_however_it_ends(play, ending, ran_s, counts_s):
    """Passes come every ten seconds here: what lies between the last one and the end counts too, once."""
    request_id = play.submit(ORGS[0], 1e6, gpu_count=2)
    play.run_pass()
    for _ in range(int(ran_s // 10)):
        play.go_on(10.0)
        play.run_pass()
    play.go_on(ran_s % 10)
    play.end((request_id, 1), lambda *attempt: ending(play, *attempt))
    play.world.nodes_up = 0  # a retry has to wait
    play.go_on(10.0)
    play.run_pass()
    assert play.shares()[ORGS[0]] == pytest.approx(2 * counts_s, rel=0.02)
    before = play.shares()
    play.restart()
    play.run_pass()
    assert play.shares() == pytest.approx(before, rel=0.02)


def test_both_attempts_of_a_job_count_each_with_its_workers(play):
    request_id = play.submit(ORGS[0], 1e6, gpu_count=2, node_count=2, min_node_count=1)
    play.run_pass()
    play.go_on(50.0)
    play.run_pass()
    play.world.nodes_up = 1
    play.end((request_id, 1), lambda r, n: play.store.record_fault(r, n, Cause.NODE_LOST, "gone."))
    for _ in range(2):
        play.run_pass()
    assert play.store.get(request_id).num_workers == 2
    play.go_on(30.0)
    play.run_pass()
    assert play.shares()[ORGS[0]] == pytest.approx(4 * 50.0 + 2 * 30.0, rel=0.02)


def test_a_job_that_ran_for_days_counts_after_a_restart_as_it_did_before(play):
    play.submit(ORGS[0], 1e6)
    play.run_pass()
    for _ in range(48):
        play.go_on(3600.0)
        play.run_pass()
    before = play.shares()
    for job in play.store.running():
        play.store.report(job.request_id, job.attempt, ran_s=48 * 3600.0)
    play.restart()
    play.run_pass()
    assert play.shares() == pytest.approx(before, rel=0.01)
    assert dt.timedelta(seconds=before[ORGS[0]]) < dt.timedelta(hours=2)
