"""Dispatchers, job actors and the store as a state machine: everything may die between any two of its steps.

Store, dispatchers' passes and job actors are the real ones; the cluster is simulated, and so is what the actors launch. A pass
runs in a thread that stops before every call of store or cluster, so hypothesis decides who goes next, interleaves two
dispatchers (one that slept past its lease included) and kills them at every line. An actor may die between any two of its steps.
TUNEYARD_MODEL_RUNS sets how many histories are tried.
"""

import asyncio
import contextlib
import datetime as dt
import itertools
import os
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from serve_app.dispatcher import DISPATCHER, LEASE_S, Passes
from serve_app.job_actor import JobActor
from serve_app.lifecycle import FINAL, Status
from serve_app.settings import Profile, Settings
from serve_app.store import pauses
from serve_app.store.audit import By
from serve_app.store.jobs import Conflict, JobStore, StaleAttempt, job_of
from serve_app.store.tables import job_events, jobs, metadata
from tests.conftest import DOCUMENTED, ORG, OTHER_ORG, with_fields
from tests.serve_app.simulated import GPUS, NODES, SimCluster, World
from train_loop.errors import Cause, RunFault, Stopped, UserError
from train_loop.spec import JobSpec

MANIFEST = {"steps": 9, "metrics": {}, "adapter_uri": "s3://runs/adapter", "adapter_files": []}
RUNS = int(os.environ.get("TUNEYARD_MODEL_RUNS", "40"))


class Killed(BaseException):
    """The process is gone."""


class Gated:
    """Stops before every method call until told to go on."""

    def __init__(self, thing, gate):
        self._thing, self._gate = thing, gate

    def __getattr__(self, name):
        found = getattr(self._thing, name)
        if not callable(found):
            return found

        def call(*args, **kwargs):
            self._gate()
            return found(*args, **kwargs)

        return call


class SteppedPass:
    """One pass of a dispatcher, a step at a time."""

    def __init__(self, owner, store, world, config):
        self.turn, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.killed = self.done = False
        self.error = None
        gated, cluster = Gated(store, self._gate), SimCluster(world)
        self.passes = Passes(config, gated, Gated(cluster, self._gate), world.clock, world.awake_s)

        def body():
            try:
                self._gate()
                if gated.acquire_lease(DISPATCHER, owner, LEASE_S) is not None:
                    self.passes.run()
            except (Killed, StaleAttempt):
                pass
            except Exception as error:  # noqa: BLE001 - raised again where the test can see it
                self.error = error
            finally:
                self.done = True
                self.back.release()

        self.thread = threading.Thread(target=body, daemon=True)
        self.thread.start()
        self.back.acquire()

    def _gate(self):
        self.back.release()
        self.turn.acquire()
        if self.killed:
            raise Killed

    def step(self):
        if not self.done:
            self.turn.release()
            self.back.acquire()
        if self.error is not None:
            raise self.error

    def finish(self):
        while not self.done:
            self.step()

    def kill(self):
        self.killed = True
        self.finish()


def pick(candidates, which):
    """One of them, or none where there are none."""
    return [candidates[which % len(candidates)]] if candidates else []


ACTIONS = [
    *["submit"] * 3,
    *["dispatch"] * 8,
    *["actor_works"] * 5,
    *["time_goes_by"] * 3,
    *("cancel", "resume", "requeue", "operator_pauses", "operator_goes_on"),
    *("dispatcher_dies", "actor_dies", "actor_completes", "actor_fails", "actor_is_preempted"),
    *("node_is_cut_off", "node_comes_back", "processes_linger", "others_take_room"),
]


class Service(RuleBasedStateMachine):
    """Users, faults and time, in any order."""

    def __init__(self):
        super().__init__()
        engine = sa.create_engine("sqlite://", poolclass=sa.pool.StaticPool, connect_args={"check_same_thread": False})
        metadata.create_all(engine)
        self.world = World()
        self.store = JobStore(engine, self.world.clock)
        self.config = Settings(
            home=Path("/nonexistent"), max_running_jobs=3, profiles={"h100": Profile(resources={"GPU": 1})}, cancel_grace_s=20
        )
        self.passes = {}
        self.jobs = []
        self.final = {}
        self.paused = self.was_paused = False
        self.started = 0
        numbers = itertools.count()  # ids that are the same whenever hypothesis plays a history again
        ids = SimpleNamespace(uuid4=lambda: f"{next(numbers):08d}-0000-4000-8000-000000000000")
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(mock.patch("serve_app.store.jobs.uuid", ids))
        clock = SimpleNamespace(monotonic=self.world.awake_s)
        self.patches.enter_context(mock.patch("serve_app.job_actor.time", clock))
        self.launch = self.patches.enter_context(mock.patch("serve_app.job_actor.launch"))
        self.actors, self.endings = {}, {}  # by attempt: the actor, and how it found out that it ends

    def teardown(self):
        for one in self.passes.values():
            one.kill()
        self.passes = {}
        try:
            self._settle()
        finally:
            self.patches.close()

    # One rule, so that every history has everything in it: hypothesis leaves whole rules out of most of them.
    @rule(what=st.sampled_from(ACTIONS), which=st.integers(0, 7), flag=st.booleans())
    def happens(self, what, which, flag):
        getattr(self, what)(which, flag)

    # --- users ---

    def submit(self, which, flag):
        infra = {"gpu_type": "h100", "gpu_count": GPUS, "node_count": 1 + which % 2, "max_retries": which % 3}
        infra |= {"min_node_count": 1} if flag else {}
        infra |= {"max_runtime_s": 60} if which == 7 else {}
        org = ORG if which < 5 else OTHER_ORG
        named = with_fields(DOCUMENTED, {"experiment_name": f"job-{len(self.jobs)}", "org": org, "infra_config": infra})
        self.jobs.append(self.store.insert(JobSpec.model_validate(named), "queued")[0].request_id)

    def cancel(self, which, flag):
        with contextlib.suppress(Conflict):
            for request_id in pick(self.jobs, which):
                self.store.request_cancel(request_id)

    def resume(self, which, flag):
        for request_id in pick([r for r in self.jobs if r in self.final], which):
            try:
                self.store.resume(request_id)
                del self.final[request_id]
            except Conflict:
                assert self.final[request_id] is Status.COMPLETED

    # --- the operator ---

    def requeue(self, which, flag):
        for request_id in pick([job.request_id for job in self.store.running()], which):
            with contextlib.suppress(StaleAttempt):
                self.store.ask_to_yield(request_id, self.store.get(request_id).attempt, "asked")

    def operator_pauses(self, which, flag):
        with self.store.write() as tx:
            pauses.begin(tx, By("admin:me"), drains=flag)
        self.paused = True

    def operator_goes_on(self, which, flag):
        with self.store.write() as tx:
            pauses.end(tx)
        self.paused = False

    # --- dispatchers ---

    def dispatch(self, which, flag):
        """A few steps of a pass, or all that is left of it."""
        name = "AB"[flag]
        one = self.passes.get(name)
        if one is None or one.done:
            one = self.passes[name] = SteppedPass(name, self.store, self.world, self.config)
        for _ in range(1 + 2 * which if which < 5 else 1000):
            one.step()

    def dispatcher_dies(self, which, flag):
        for name in pick(sorted(n for n, p in self.passes.items() if not p.done), which):
            self.passes.pop(name).kill()

    # --- job actors ---

    def actor_dies(self, which, flag):
        for attempt in pick(sorted(self.world.actors | self.world.unseen), which):
            self._gone(attempt)

    def actor_works(self, which, flag):
        self._actor("work", which, flag)

    def actor_completes(self, which, flag):
        self._actor("complete", which, flag)

    def actor_fails(self, which, flag):
        self._actor("user_error" if flag else "fault", which, flag)

    def actor_is_preempted(self, which, flag):
        self._actor("loss", which, flag)

    def _actor(self, act, which, dies_after):
        for attempt in pick(sorted(self.world.actors | self.world.unseen), which):
            self._act(attempt, act)
            if dies_after and act == "complete":
                self._gone(attempt)

    def _gone(self, attempt):
        self.world.actors.pop(attempt, None)
        self.world.unseen.pop(attempt, None)

    def _act(self, attempt, act):
        """One step of a job actor; StaleAttempt means that it must go."""
        request_id, number = attempt
        there = self.world.actors if attempt in self.world.actors else self.world.unseen
        try:
            if not there[attempt]:
                actor = JobActor.__new__(JobActor)  # without Ray and its threads
                actor.open(self.config, self.store, request_id, number, "node-0")
                self.actors[attempt], there[attempt] = actor, True
                self.endings.pop(attempt, None)
                return
            actor = self.actors[attempt]
            if attempt in self.endings:
                before = self.store.get(request_id)
                actor.write(self.endings[attempt])
                self._gone(attempt)
                after = self.store.get(request_id)
                assert not after.open or after.attempt != number or after.cancel_requested or after.yield_requested_at
                # That is the dispatcher's to write, once nothing of the run is left.
                assert after.status is before.status or after.status is not Status.CANCELED
                return
            if attempt in self.world.told_to_stop:
                asyncio.run(actor.cancel())
            job = actor.report()
            assert (job.attempt, job.open) == (number, True)  # nobody else's to write
            if attempt not in self.world.placed and not actor.stop:
                if not self.world.place(attempt, job.num_workers):
                    return self._ends(attempt, RunFault(Cause.NO_ROOM, "no room."))
                asyncio.run(actor.on_phase("training"))
            if actor.stop:
                self._ends(attempt, Stopped())
            elif act == "work":
                asyncio.run(actor.on_progress({"step": job.step + 1}))
                actor.report()
            elif act == "complete":
                self._ends(attempt, None)
            elif act == "user_error":
                self._ends(attempt, UserError("theirs"))
            else:
                self._ends(attempt, RunFault(Cause.PREEMPTED if act == "loss" else Cause.WORKER_DIED, "it broke."))
        except StaleAttempt:
            self._gone(attempt)

    def _ends(self, attempt, how):
        """The launch ends like that; it is written down in the actor's next step, if it has one."""
        self.launch.side_effect, self.launch.return_value = how, MANIFEST
        self.endings[attempt] = self.actors[attempt].run()

    # --- machines and time ---

    def time_goes_by(self, which, flag):
        seconds = (0.1, 1, 5, 16, 20, 31, 61, 700)[which]
        if flag and seconds > 600:  # the machine was suspended
            self.world.now += dt.timedelta(seconds=seconds)
        else:
            self.world.later(seconds)

    def node_is_cut_off(self, which, flag):
        """The cluster takes its actors for dead; they go on for a while, perhaps until others have taken over."""
        self.world.unseen |= self.world.actors
        self.world.actors.clear()
        self.world.nodes_up = max(0, self.world.nodes_up - 1)
        for _ in range(3 if flag else 0):
            self.world.later(61)
            SteppedPass("A", self.store, self.world, self.config).finish()

    def node_comes_back(self, which, flag):
        self.world.nodes_up = min(NODES, self.world.nodes_up + 1)

    def processes_linger(self, which, flag):
        """What ended actors started is slow to go, or has gone."""
        self.world.stuck = which if flag else 0

    def others_take_room(self, which, flag):
        """Somebody else's work comes to the same machines, as far as they are free, or goes."""
        self.world.others = [0] * NODES
        self.world.others = [min(which, free) for free in self.world.free()] + [0] * (NODES - self.world.nodes_up)

    # --- what must hold ---

    @invariant()
    def what_must_hold(self):
        """In all jobs, which are read at once: this is looked at after every step."""
        found = self._found()
        assert {job.request_id for job in found} == set(self.jobs)
        with self.store.read() as db:
            query = sa.select(job_events.c.request_id).where(job_events.c.kind == "started")
            starts = Counter(db.execute(query).scalars())
        self.final_states_are_final(found)
        self.nothing_runs_of_a_canceled_job(found)
        self.no_more_runs_than_may(found)
        self.nothing_starts_during_a_pause(found)
        self.at_most_one_attempt_can_write(found, starts)

    def _found(self):
        with self.store.read() as db:
            return [job_of(row) for row in db.execute(sa.select(jobs))]

    def final_states_are_final(self, found):
        for job in found:
            assert self.final.get(job.request_id, job.status) is job.status
            if job.status in FINAL:
                self.final[job.request_id] = job.status

    def nothing_runs_of_a_canceled_job(self, found):
        for job in found:
            assert job.status is not Status.CANCELED or not self.world.actors.get((job.request_id, job.attempt))

    def no_more_runs_than_may(self, found):
        assert len([job for job in found if job.open]) <= self.config.max_running_jobs

    def nothing_starts_during_a_pause(self, found):
        started = sum(job.attempt for job in found)
        assert started == self.started or not self.was_paused
        self.started, self.was_paused = started, self.paused

    def at_most_one_attempt_can_write(self, found, starts):
        for job in found:
            assert starts[job.request_id] == job.attempt  # each attempt once, however many dispatchers
            assert max((n for r, n in self.world.actors if r == job.request_id), default=0) <= job.attempt

    def _settle(self):
        """Without more faults everything comes to an end, and nothing is left."""
        self.world.nodes_up, self.world.stuck, self.world.others = NODES, 0, [0] * NODES
        self.world.unseen.clear()
        self.operator_goes_on(0, False)
        passes = Passes(self.config, self.store, SimCluster(self.world), self.world.clock, self.world.awake_s)
        for _ in range(400):
            if self.store.acquire_lease(DISPATCHER, "last", LEASE_S) is not None:
                passes.run()
            for attempt in list(self.world.actors):
                for act in ("work", "work", "complete"):
                    if attempt in self.world.actors:
                        self._act(attempt, act)
            self.final_states_are_final(self._found())
            self.world.later(10)
            if len(self.final) == len(self.jobs) and not self.world.actors:
                break
        assert set(self.final) == set(self.jobs), [self.store.get(r) for r in self.jobs if r not in self.final]
        assert self.world.actors == {}
        self.world.later(LEASE_S + 1)  # whoever led before may have asked for machines
        SteppedPass("last", self.store, self.world, self.config).finish()
        assert self.world.asked == []
        at_most_retries = [self.store.get(r) for r in self.jobs]
        assert all(j.faults <= j.spec["infra_config"]["max_retries"] + 1 for j in at_most_retries)


ServiceSurvives = Service.TestCase
ServiceSurvives.settings = settings(max_examples=RUNS, stateful_step_count=40, suppress_health_check=list(HealthCheck))


def test_a_run_that_stopped_because_it_was_asked_to_is_canceled_by_the_dispatcher():
    """A history that chance seldom makes."""
    service = Service()
    for what, which in [("submit", 0), ("dispatch", 7), *[("actor_works", 0)] * 3, ("cancel", 0), *[("actor_works", 0)] * 2]:
        service.happens(what=what, which=which, flag=False)
    [job] = [service.store.get(request_id) for request_id in service.jobs]
    assert (job.status, job.open, service.world.actors) == (Status.RUNNING, True, {})
    service.teardown()
    assert service.store.get(job.request_id).status is Status.CANCELED
