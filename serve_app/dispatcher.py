"""Admission, launch, reconciliation: one detached actor, and a lease in the store so that two never act.

A pass is a plain comparison of the store with the cluster, so a restart of anything (this actor, a job actor, the whole head
node) is only one more pass. Whatever line a dispatcher dies at, the next one's pass does the rest: every change of a job is one
transaction fenced by its attempt, and every effect on the cluster may be repeated.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
import uuid
from collections.abc import Callable, Sequence

import structlog

from serve_app import logs, metrics, traces
from serve_app.cluster import DISPATCHER, Attempt, Cluster, Growth, Node, RayCluster, bundle_of
from serve_app.housekeeping import clean
from serve_app.lifecycle import BEFORE_WORKERS, NOTHING_TO_SAVE
from serve_app.meter import QueueMeter
from serve_app.outside import Listener, RayRuns
from serve_app.quota import default_quota
from serve_app.ready import ReadyProcesses
from serve_app.scheduler import EPSILON, HALF_LIFE_S, LEAST_S, Bundle, Decision, Gang, Limits, Room, Run, Shares, decide
from serve_app.secrets import SecretVault
from serve_app.settings import Settings
from serve_app.store import pauses
from serve_app.store.jobs import STORE_AWAY, Job, JobStore, StaleAttempt, utc_now
from serve_app.store.quotas import NO_QUOTA, Quota, all_quotas
from serve_app.webhooks import Deliverer, Webhooks
from train_loop.errors import Cause

log = structlog.get_logger()
POLL_S = 2.0
BUSY_POLL_S = 0.5  # while a job is being canceled or between two attempts
LEASE_S = 15.0
START_S = 30.0  # an actor that hasn't reported by then isn't coming
LEFTOVERS_S = 120.0  # what a dead actor started ends within about a second; on a lost node, when Ray has noticed that it is lost
LOOK_AHEAD_PER_ORG = 200  # queued jobs of an org looked at in a pass
UNPLACEABLE_S = 600.0  # a machine may be away for a while; a job too large for all that are left waits as long as this
CAPACITY_S = 30.0
CLEAN_S = 600.0
READY_S = 3.0
WEBHOOKS_S = 1.0
OUTSIDE_S = 2.0

Turn = Callable[[], object]


class Dispatcher:
    """The actor. Starts its loop by itself, so that a restarted one goes on without being called.

    `deployment` is when the application was made that has started it, in ns: a newer one puts its own in the place of this.
    """

    def __init__(self, deployment: int = 0) -> None:
        logs.configure()
        self._deployment = deployment
        settings = Settings.load()
        self.store = JobStore.open(settings.database_url)
        self.passes = Passes(settings, self.store, RayCluster(settings.ray_namespace))
        self.owner = uuid.uuid4().hex
        self.wake = threading.Event()
        self.settings = settings
        self.leads = False
        threading.Thread(target=self._loop, name="dispatch", daemon=True).start()
        self._often("housekeeping", CLEAN_S, self._housekeeping)
        self._often("webhooks", WEBHOOKS_S, self._telling)
        self._often("outside", OUTSIDE_S, lambda: Listener(self.store, RayRuns()).run)
        if settings.ready_workers:
            self._often("ready", READY_S, self._readying)

    def poke(self) -> None:
        """Look now instead of at the next poll."""
        self.wake.set()

    def ping(self) -> bool:
        """Whether the actor is alive."""
        return True

    def deployment(self) -> int:
        """Of which deployment it is."""
        return self._deployment

    def _loop(self) -> None:
        busy, meter = False, QueueMeter(self.store)
        while True:
            began = time.monotonic()
            try:
                self.leads = self.store.acquire_lease(DISPATCHER, self.owner, LEASE_S) is not None
                if self.leads:
                    busy = self.passes.run()
                    meter.passed(time.monotonic() - began)
                else:
                    self.passes.forget()
                    meter.forget()
            except STORE_AWAY as error:
                log.warning("the job store is away; trying again", error=type(error).__name__)
                self.passes.forget()
                meter.store_away()
            except Exception:
                log.exception("a dispatch pass failed; trying again")
                meter.failed()
            self.wake.wait(BUSY_POLL_S if busy else POLL_S)
            self.wake.clear()

    def _often(self, name: str, every_s: float, made: Callable[[], Turn]) -> None:
        """Have a thread of that name take turns while this dispatcher leads; what hangs there holds up nothing else."""

        def go() -> None:
            turn = made()
            while True:
                time.sleep(every_s)
                try:
                    if self.leads:
                        turn()
                except STORE_AWAY as error:
                    log.warning("the job store is away; trying again", thread=name, error=type(error).__name__)
                except Exception:
                    log.exception("a turn failed; trying again", thread=name)

        threading.Thread(target=go, name=name, daemon=True).start()

    def _housekeeping(self) -> Turn:
        def turn() -> None:
            if any((done := clean(self.settings, self.store)).values()):
                log.info("cleaned up", **done)

        return turn

    def _telling(self) -> Turn:
        vault = SecretVault.from_settings(self.store, self.settings)
        return Deliverer(self.store, Webhooks.of(self.store, vault, self.settings)).run

    def _readying(self) -> Turn:
        ready = ReadyProcesses(self.settings.ready_workers or 0)

        def turn() -> None:
            if not self.passes.starting:
                ready.top_up(one_by_one=self.passes.running)

        return turn


class Passes:
    """What a dispatcher does again and again. What it keeps between passes may be lost at any time."""

    def __init__(
        self,
        settings: Settings,
        store: JobStore,
        cluster: Cluster,
        now: Callable[[], dt.datetime] = utc_now,
        awake_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings, self.store, self.cluster, self._now, self._awake_s = settings, store, cluster, now, awake_s
        self._passed = now(), awake_s()
        self._pause: pauses.Pause | None = None
        self._quotas: dict[str, Quota] = {}  # of orgs that have their own
        # In the last pass: whether a job ran, and whether one was on the way to its first step, or to its start.
        self.running = self.starting = False
        self.forget()

    def forget(self) -> None:
        """Start afresh, as after a restart: the store couldn't be written for a while, or another dispatcher acted."""
        self._since = self._now()  # a heartbeat can't be older than a store that could be written
        self._seen_at = self._since
        self._shares: Shares | None = None
        self._counted: dict[Attempt, dt.datetime] = {}  # of each attempt under way: up to when it is in the shares
        self._unplaceable: dict[str, dt.datetime] = {}
        self._capacity: dict[str, int] | None = None
        self._capacity_at = self._since
        self._growth: Growth | None = None
        self._ended_at: dict[Attempt, dt.datetime] = {}
        self._clear: set[Attempt] = set()
        self._unreachable: set[str] = set()  # machines
        self._asked: list[Bundle] | None = None  # what the autoscaler was asked for

    def run(self) -> bool:
        """One pass; whether the next one should come soon."""
        if self._slept_s() > LEASE_S:
            self.forget()
        nodes = self.cluster.nodes()
        with self.store.read() as tx:
            self._pause, self._quotas = pauses.current(tx), all_quotas(tx)
        running = self.store.running()  # before who is alive: another dispatcher may be starting one
        alive = self.cluster.attempts()
        busy = self._reconcile(running, alive, nodes)
        self._sweep(alive)
        self._admit(nodes)
        return busy

    def _slept_s(self) -> float:
        """For how long the machine was suspended, or its clock put forward, since the last pass: nobody could report then."""
        (then, awake_then), self._passed = self._passed, (self._now(), self._awake_s())
        now, awake = self._passed
        return (now - then).total_seconds() - (awake - awake_then)

    # --- reconciliation ---

    def _reconcile(self, running: list[Job], alive: set[Attempt], nodes: list[Node]) -> bool:
        busy = False
        for job in running:
            attempt = (job.request_id, job.attempt)
            try:
                if job.cancel_requested:
                    busy = True
                    self._cancel(job, attempt in alive)
                elif job.yield_requested_at is not None or (self._pause is not None and self._pause.drains):
                    busy = True
                    self._give_back(job, attempt in alive)
                elif job.retry_at is not None:
                    # Admission has the next word, once the wait is over and nothing is left of the attempt before.
                    busy = busy or (job.retry_at <= self._now() and attempt not in self._clear)
                elif attempt not in alive:
                    self._missing(job, nodes)
                elif self._silent_s(job) > (self.settings.heartbeat_timeout_s if job.heartbeat_at else START_S):
                    self.cluster.end(attempt)
            except StaleAttempt:
                log.info("the attempt has ended by itself", request_id=job.request_id, attempt=job.attempt)
            except STORE_AWAY:
                raise
            except Exception:  # the others' turn must come all the same
                log.exception("a job can't be seen to", request_id=job.request_id, attempt=job.attempt)
        return busy

    def _cancel(self, job: Job, alive: bool) -> None:
        """CANCELED once nothing of the run is left."""
        if self._has_stopped(job, alive, job.cancel_requested_at):
            kept = "; what was trained so far is kept as a checkpoint" if job.step else ""
            self.store.cancel_ended(job.request_id, job.attempt, f"Canceled on request{kept}.")
            log.info("canceled", request_id=job.request_id, attempt=job.attempt)

    def _give_back(self, job: Job, alive: bool) -> None:
        """QUEUED once nothing of the run is left."""
        if job.yield_requested_at is None:  # written down first: whoever finds the run ended must know why
            message = "The operator has asked all jobs to save and wait."
            job = self.store.ask_to_yield(job.request_id, job.attempt, message)
        if self._has_stopped(job, alive, job.yield_requested_at):
            self.store.give_back(job.request_id, job.attempt)
            log.info("given back", request_id=job.request_id, attempt=job.attempt)

    def _has_stopped(self, job: Job, alive: bool, asked_at: dt.datetime | None) -> bool:
        """Ask the run to stop, after the grace period end it; whether nothing of it is left."""
        attempt, now = (job.request_id, job.attempt), self._now()
        asked_s = (now - (asked_at or now)).total_seconds()
        if alive and (job.phase in NOTHING_TO_SAVE or asked_s > self.settings.cancel_grace_s):
            self.cluster.end(attempt)
        elif alive:
            self.cluster.ask_to_stop(attempt)
        return not alive and self._is_clear(job)

    def _missing(self, job: Job, nodes: list[Node]) -> None:
        """An open attempt without an actor: it never came to be, or has died."""
        if job.heartbeat_at is None and self._silent_s(job) < START_S:
            self.cluster.start(job)  # a dispatcher died between its transaction and this
        elif job.actor_node is not None and job.actor_node not in {n.node_id for n in nodes}:
            self._fault(job, Cause.NODE_LOST, "the machine that the job was run from is gone.")
        else:
            self._fault(job, Cause.WORKER_DIED, "the process that ran the job died.")

    def _fault(self, job: Job, cause: Cause, message: str) -> None:
        log.warning("an attempt died", request_id=job.request_id, attempt=job.attempt, cause=str(cause))
        self.store.record_fault(job.request_id, job.attempt, cause, message)

    def _silent_s(self, job: Job) -> float:
        return (self._now() - max(job.heartbeat_at or job.updated_at, self._since)).total_seconds()

    def _sweep(self, alive: set[Attempt]) -> None:
        """End job actors that no open attempt stands behind."""
        for request_id, attempt in alive:
            job = self.store.get(request_id)
            if job is None or not job.open or job.attempt > attempt:
                self.cluster.end((request_id, attempt))

    # --- admission ---

    def _admit(self, nodes: list[Node]) -> None:
        now = self._now()
        waiting = self.store.waiting(LOOK_AHEAD_PER_ORG)
        open_jobs = [job for job in self.store.running() if job.open]
        shares = self._shares_now(open_jobs, now)
        due = {job.request_id: job for job in waiting if (job.retry_at is None or job.retry_at <= now) and self._is_ready(job)}
        due = due if self._pause is None else {}
        taking = self._taking(nodes, due)
        running = [Run(self._gang(job), job.num_nodes or 1, job.phase not in BEFORE_WORKERS) for job in open_jobs]
        free = [node.free for node in taking]
        decision = decide([self._gang(j) for j in due.values()], running, free, self._limits(), shares, now)
        for gang, num_nodes in decision.starts:
            self._start(due[gang.request_id], num_nodes, shares)
        self._clear &= {(job.request_id, job.attempt) for job in waiting}
        told = {job.request_id: job.queue_position for job in waiting}
        self.store.set_queue_positions({k: place for k, place in decision.positions.items() if told[k] != place})
        self._ask_for_room(nodes, running, decision)
        empty = Room.of(node.resources for node in taking)
        self._look_at_capacity(empty, now)
        started = {gang.request_id for gang, _ in decision.starts}
        self.running = bool(started or open_jobs)
        self.starting = bool(started) or any(job.phase in NOTHING_TO_SAVE for job in open_jobs)
        # While the operator has the service paused, machines may be away for as long as it takes.
        left = [job for job in waiting if job.request_id not in started] if self._pause is None else []
        self._refuse_what_never_fits(left, empty, now)

    def _taking(self, nodes: list[Node], due: dict[str, Job]) -> list[Node]:
        """The machines that take new work. One that a job has just lost may seem alive to Ray for half a minute."""
        lately_lost = any(job.losses for job in due.values())
        suspects = {node.node_id for node in nodes if lately_lost or node.node_id in self._unreachable}
        self._unreachable = self.cluster.unreachable(suspects)
        return [node for node in nodes if not node.draining and node.node_id not in self._unreachable]

    def _is_ready(self, job: Job) -> bool:
        """Whether the job may start if it has room. What its earlier attempts held is free a moment after they are gone, node by
        node: a job that takes what there is would take too little, so it has its turn in the next pass."""
        gang, seen_before = self._gang(job), job.attempt == 0 or (job.request_id, job.attempt) in self._clear
        return self._is_clear(job) and (seen_before or gang.min_nodes == gang.max_nodes)

    def _is_clear(self, job: Job) -> bool:
        """Whether nothing is left of the job's earlier attempts, for as long as that is worth waiting for."""
        attempt = (job.request_id, job.attempt)
        if job.attempt == 0 or attempt in self._clear:
            return True
        since = self._ended_at.setdefault(attempt, self._now())
        clear = self.cluster.leftovers(job.request_id) == 0 or (self._now() - since).total_seconds() > LEFTOVERS_S
        if clear:
            del self._ended_at[attempt]
            self._clear.add(attempt)
        return clear

    def _start(self, job: Job, num_nodes: int, shares: Shares) -> None:
        began_ns = time.time_ns()
        started = self.store.start_attempt(job.request_id, job.attempt, num_nodes)
        if started is not None:
            shares.add(started.org_id, started.num_workers, LEAST_S)
            self._counted[started.request_id, started.attempt] = started.updated_at + dt.timedelta(seconds=LEAST_S)
            log.info("starting", request_id=job.request_id, attempt=started.attempt, workers=started.num_workers)
            kind = job.spec["infra_config"]["gpu_type"]
            metrics.ATTEMPTS.record(1, gpu_type=kind)
            metrics.QUEUE_WAIT.record((self._now() - job.waiting_since).total_seconds(), gpu_type=kind)
            self.cluster.start(started)
            traces.launched(job, began_ns)

    def _shares_now(self, open_jobs: list[Job], now: dt.datetime) -> Shares:
        """What each org has had by now. An attempt counts from its start to its end, also one that no pass has seen under way."""
        if self._shares is None:
            self._shares = self._shares_so_far(now)
        else:
            self._shares.pass_time((now - self._seen_at).total_seconds())
        under_way = {(job.request_id, job.attempt): job for job in open_jobs}
        for attempt, until in self._counted.items():
            job = under_way.get(attempt) or self.store.get(attempt[0])
            if job is not None and (end := _end(job, now)) > until:
                self._shares.add(job.org_id, job.num_workers, (end - until).total_seconds())
        self._counted = {attempt: max(now, self._counted.get(attempt, now)) for attempt in under_way}
        self._seen_at = now
        return self._shares

    def _shares_so_far(self, now: dt.datetime) -> Shares:
        """As far as the store knows; what was canceled or failed and then resumed counts from there."""
        shares = Shares()
        for job in self.store.worked_since(now - dt.timedelta(seconds=3 * HALF_LIFE_S)):
            ago_s = (now - _end(job, now)).total_seconds()
            shares.add(job.org_id, job.num_workers, max(job.ran_s, LEAST_S), ago_s)
            if job.open:
                ahead_s = max(0.0, LEAST_S - job.ran_s)
                self._counted[job.request_id, job.attempt] = now + dt.timedelta(seconds=ahead_s)
        return shares

    def _limits(self) -> Limits:
        s = self.settings
        own = {org: self._quota(org) for org in self._quotas}
        of_orgs = {org: (quota.max_running_jobs, quota.max_gpus) for org, quota in own.items()}
        return Limits(s.max_running_jobs, s.max_running_jobs_per_org, s.max_workers, s.max_gpus_per_org, of_orgs)

    def _quota(self, org_id: str) -> Quota:
        return self._quotas.get(org_id, NO_QUOTA).over(default_quota(self.settings))

    def _gang(self, job: Job) -> Gang:
        infra = job.spec["infra_config"]
        profile = self.settings.profiles.get(infra["gpu_type"])
        return Gang(
            request_id=job.request_id,
            org_id=job.org_id,
            seq=job.seq,
            priority=job.priority,
            waiting_since=job.waiting_since,
            # A profile that the operator has taken away since: nothing has such a resource, so the job is refused in time.
            bundle=bundle_of(profile) if profile else {f"gpu_type:{infra['gpu_type']}": 1.0},
            per_node=infra["gpu_count"],
            min_nodes=infra.get("min_node_count") or infra["node_count"],
            max_nodes=infra["node_count"],
        )

    def _ask_for_room(self, nodes: list[Node], running: list[Run], decision: Decision) -> None:
        """Show the autoscaler what is held on each node, by whomever, and what we promised and what waits for room; nothing when
        nobody waits, so that nodes go again."""
        wanted: list[Bundle] = []
        if decision.lacking:
            promised = [(run.gang, run.num_nodes) for run in running if not run.placed]
            gangs = [*promised, *decision.starts, *decision.lacking]
            names = sorted({name for gang, _ in gangs for name in gang.bundle})
            wanted += [held for node in nodes if (held := _held(node, names))]
            wanted += [gang.bundle for gang, n in gangs for _ in range(gang.per_node * n)]
        if wanted != self._asked:
            self.cluster.ask_for(wanted)
            self._asked = wanted

    def _refuse_what_never_fits(self, waiting: list[Job], empty: Room, now: dt.datetime) -> None:
        too_large = {}
        for job in waiting:
            gang, kind = self._gang(job), job.spec["infra_config"]["gpu_type"]
            needed = gang.per_node * gang.min_nodes
            limits = (self._most(kind, empty), self.settings.max_workers, self._quota(job.org_id).max_gpus)
            most = min((limit for limit in limits if limit is not None), default=None)
            if most is not None and most < needed:
                too_large[job.request_id] = (needed, most, kind)
        self._unplaceable = {k: self._unplaceable.get(k, now) for k in too_large}
        for request_id, (needed, most, kind) in too_large.items():
            if (now - self._unplaceable[request_id]).total_seconds() > UNPLACEABLE_S:
                text = f"The job needs {needed} workers of {kind}; it can have {most} here, by the cluster's size or its limits."
                self.store.refuse(request_id, "too_large", text)
                log.warning("refused", request_id=request_id, message=text)

    def _most(self, kind: str, empty: Room) -> int | None:
        """The most workers of a gpu_type that there can ever be; None where nobody knows."""
        profile = self.settings.profiles.get(kind)
        if profile is None:
            return 0
        if profile.max_workers is not None:
            return profile.max_workers
        there = empty.count(bundle_of(profile))
        if not self.settings.autoscales:
            return there
        return None if self._growth is None else max(there, self._growth.count(bundle_of(profile)))

    def _look_at_capacity(self, empty: Room, now: dt.datetime) -> None:
        """See now and then how large the cluster may be, and let the ingress know what can be accepted without asking Ray."""
        if self._capacity is not None and (now - self._capacity_at).total_seconds() < CAPACITY_S:
            return
        self._growth = self.cluster.growth()
        before = self._capacity or {}
        most = {kind: self._most(kind, empty) for kind in self.settings.profiles}
        # The most ever seen: a machine that is away for a while shouldn't have jobs refused.
        found = {kind: max(count, before.get(kind, 0)) for kind, count in most.items() if count is not None}
        if found != self._capacity:
            self.store.set_capacity(found)
        self._capacity, self._capacity_at = found, now


def _end(job: Job, now: dt.datetime) -> dt.datetime:
    """When the job's last attempt ended; now, if it is under way."""
    return now if job.open else min(now, job.completed_at or job.updated_at)


def _held(node: Node, names: Sequence[str]) -> Bundle:
    """What somebody holds of these resources of a node."""
    held = {name: round(node.resources.get(name, 0.0) - node.free.get(name, 0.0), 4) for name in names}
    return {name: amount for name, amount in held.items() if amount > EPSILON}
