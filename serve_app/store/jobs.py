"""The jobs in the store. Every state change is one function here, and one transaction.

`attempt` fences: a write by an older attempt is refused, whatever it wants to write. An attempt is open from `start_attempt`
until the job ends or a fault closes it; a job between two attempts is RUNNING with `retry_at` set.
"""

from __future__ import annotations

import base64
import datetime as dt
import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from serve_app.lifecycle import FINAL, RESUMABLE, Phase, Status, check
from serve_app.retry import judge
from serve_app.store import schema
from serve_app.store.audit import By, add_entry
from serve_app.store.journal import Journal, Notes, add_event, add_notes
from serve_app.store.pauses import PAUSED
from serve_app.store.tables import OURS, capacity, idempotency, jobs, leases, quotas
from serve_app.store.webhooks import announce
from train_loop.errors import Cause
from train_loop.spec import JobSpec

IDEMPOTENCY_HOURS = 24
MAX_SEQ = 2**63 - 1
SHOWN = (jobs, PAUSED.label("paused"))
CAPACITY_AGE_S = 5.0
NAME_TRIES = 3  # for a name whose holder ends between our try and the look at who holds it
NEARLY_FULL = 100  # waiting jobs below the limit, more than are ever added at once
WRITES = "tuneyard_writes"
PROVEN_S = 1.0  # a connection to PostgreSQL that was used so short a time ago is there still
# libpq's, where the URL doesn't say: a server that is gone without a word is noticed in half a minute. The system's own way takes
# a quarter of an hour, and two hours for one that owes an answer.
NOTICED = {
    "connect_timeout": 10,  # s
    "tcp_user_timeout": 30_000,  # ms
    **{"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 4},
}
READ_ONLY = "25006"  # PostgreSQL's code: it takes no writes
STORE_AWAY = (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError)  # nothing was written; it may come back


class Conflict(Exception):
    """The state of things doesn't allow what was asked; the message says what does."""


class NameTaken(Conflict):
    """Another job of the org that is queued, running or completed has this experiment_name."""

    def __init__(self, name: str, other: str) -> None:
        super().__init__(f"experiment_name {name} is in use by job {other}: choose another name")
        self.other = other


class IdempotencyMismatch(Conflict):
    """The Idempotency-Key was used before, with another body."""


class QueueFull(Exception):
    """The org has as many waiting jobs as it may have."""


class AlreadyFinal(Conflict):
    """The job has ended; nothing about it changes any more."""


class NotResumable(Conflict):
    """The job hasn't failed and wasn't canceled, so there is nothing to resume; or it isn't in the service's hands."""


class StaleAttempt(Exception):
    """The writer is not the job's current attempt: it must stop."""


@dataclass(frozen=True)
class Job:
    """One row."""

    seq: int  # order of submission
    request_id: str
    org_id: str
    experiment_name: str
    status: Status
    phase: str
    attempt: int  # attempts started so far
    priority: int
    waiting_since: dt.datetime  # since when it waits for its turn, or did before the attempt under way
    queue_position: int | None  # as the dispatcher last saw it
    num_nodes: int | None  # of the attempt under way, or the last one
    actor_node: str | None  # Ray's id of the node where that attempt's job actor is
    retry_at: dt.datetime | None  # not before then comes the next attempt; set only between attempts
    faults: int  # since submit or resume, those that count against max_retries
    losses: int  # faults of the machines in a row without a step between them; they don't count
    fault_step: int  # the step of the last fault
    fault_cause: str | None  # of the last fault since submit or resume
    ran_s: float  # seconds that attempts ran since submit or resume
    cancel_requested_at: dt.datetime | None
    yield_requested_at: dt.datetime | None  # the operator has asked it to save and go back to the queue
    worker_s: float  # seconds that workers were had, times their number, by all its attempts
    journal_removed_at: dt.datetime | None  # what the operator's settings have removed since it ended
    checkpoints_removed_at: dt.datetime | None
    ray_job: str | None  # the Ray job that it is, where `ray job submit` started it outside the service: see store/outside.py
    ray_cursor: str | None  # of what was heard of that
    spec: dict[str, Any]  # the JobSpec as resolved
    message: str
    progress: float  # 0..1
    step: int
    total_steps: int | None
    epoch: float
    eta_s: float | None
    metrics: dict[str, Any]
    error_code: str | None
    error_message: str | None
    output_model_path: str | None
    created_at: dt.datetime
    updated_at: dt.datetime
    started_at: dt.datetime | None
    completed_at: dt.datetime | None
    heartbeat_at: dt.datetime | None
    paused: bool = False  # no attempt starts at the moment; known of jobs that were read to be shown

    @property
    def cancel_requested(self) -> bool:
        """Whether someone asked to stop it."""
        return self.cancel_requested_at is not None

    @property
    def open(self) -> bool:
        """Whether its newest attempt may write."""
        return self.status is Status.RUNNING and self.retry_at is None

    @property
    def num_workers(self) -> int:
        """World size of the attempt under way, or the one asked for."""
        infra = self.spec["infra_config"]
        return int(infra["gpu_count"] * (self.num_nodes or infra["node_count"]))


def utc_now() -> dt.datetime:
    """The time, aware."""
    return dt.datetime.now(dt.UTC)


def job_of(row: Any) -> Job:
    """From a row of the table, with or without what is only known of jobs that are shown."""
    fields = dict(row._mapping)
    return Job(**fields | {"status": Status(fields["status"])})


def new_row(spec: JobSpec, request_id: str, message: str, now: dt.datetime) -> dict[str, Any]:
    """A job that was just submitted."""
    return {
        "request_id": request_id,
        "org_id": spec.org,
        "experiment_name": spec.experiment_name,
        "status": Status.QUEUED,
        "phase": Phase.QUEUED,
        "attempt": 0,
        "priority": spec.infra_config.priority,
        "waiting_since": now,
        "spec": spec.model_dump(mode="json"),
        "message": message,
        "progress": 0.0,
        "step": 0,
        "epoch": 0.0,
        "metrics": {},
        "created_at": now,
        "updated_at": now,
    }


class JobStore:
    """Jobs, their events and the dispatcher's lease. Safe to share between threads."""

    def __init__(self, engine: Engine, now: Callable[[], dt.datetime] = utc_now) -> None:
        self.engine, self._now = engine, now
        self._capacity: dict[str, int] = {}
        self._capacity_until = 0.0
        self._writer = engine.execution_options(**{WRITES: True})
        # A transaction around a single statement is two round trips more. SQLite's connections begin none by themselves.
        self._reader = engine if engine.name == "sqlite" else engine.execution_options(isolation_level="AUTOCOMMIT")
        self.journal = Journal(self.read)

    @classmethod
    def open(cls, url: str) -> JobStore:
        """Connect to `url`; nothing is created. Raises RuntimeError for a URL of no database that is known here."""
        if not url.startswith("sqlite"):
            try:
                told = {name: value for name, value in NOTICED.items() if name not in sa.make_url(url).query}
                engine = sa.create_engine(url, connect_args=told, pool_use_lifo=True)  # few connections, and those in use
            except (sa.exc.ArgumentError, ImportError):
                wanted = "postgresql+psycopg://user:password@host/name"
                raise RuntimeError(f"TUNEYARD_DATABASE_URL isn't of a database that Tuneyard knows: give {wanted}") from None
            _replace_dead_connections(engine)
            _leave_standbys(engine)
            return cls(engine)
        engine = sa.create_engine(url, connect_args={"timeout": 30})

        @sa.event.listens_for(engine, "connect")
        def _configure(connection: Any, record: Any) -> None:
            connection.isolation_level = None  # SQLAlchemy's "begin" below is the only one that begins
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")

        @sa.event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            # A writer takes the write lock at once: upgrading a read lock later fails instead of waiting.
            if connection.get_execution_options().get(WRITES):
                connection.exec_driver_sql("BEGIN IMMEDIATE")

        return cls(engine)

    def read(self) -> AbstractContextManager[Connection]:
        """A connection that only reads, each statement what is committed by then: on SQLite it waits for no writer."""
        return self._reader.connect()

    def write(self) -> AbstractContextManager[Connection]:
        """A transaction: committed at the end, rolled back by an exception."""
        return self._writer.begin()

    def migrate(self) -> None:
        """Bring the schema to this version's; again is harmless. Raises RuntimeError for a later version's that doesn't fit."""
        with self.write() as connection:
            schema.upgrade(connection)

    def downgrade(self, revision: str) -> None:
        """Take the schema back to `revision`; `base` is before the first one."""
        with self.write() as connection:
            schema.downgrade(connection, revision)

    def require_current(self) -> None:
        """Raise RuntimeError unless this code can work on the schema."""
        with self.read() as connection:
            schema.require_usable(connection)

    def ping(self) -> None:
        """Raise unless the store answers and has its tables."""
        with self.read() as connection:
            connection.execute(sa.select(jobs.c.seq).limit(1))

    # --- submit and read ---

    def insert(
        self,
        spec: JobSpec,
        message: str,
        idempotency_key: str | None = None,
        body_hash: str = "",
        max_queued: int | None = None,
        by: By | None = None,
    ) -> tuple[Job, bool]:
        """Add a job, QUEUED; (job, True), or (the earlier job, False) for a repeated idempotency key.

        Raises NameTaken, IdempotencyMismatch, QueueFull when the org has `max_queued` waiting jobs, or as many as its own quota.
        """
        request_id, now = str(uuid.uuid4()), self._now()
        row = new_row(spec, request_id, message, now)
        for _ in range(NAME_TRIES):
            try:
                with self.write() as tx:
                    if idempotency_key is not None:
                        earlier = self._earlier(tx, spec.org, idempotency_key, body_hash, now)
                        if earlier is not None:
                            return earlier, False
                        key = {"org_id": spec.org, "key": idempotency_key}
                        tx.execute(sa.delete(idempotency).filter_by(**key))  # one that has expired
                        made = {"body_hash": body_hash, "request_id": request_id, "created_at": now}
                        tx.execute(sa.insert(idempotency).values(**key, **made))
                    _require_room(tx, spec.org, max_queued)
                    job = job_of(tx.execute(sa.insert(jobs).values(**row).returning(*SHOWN)).one())
                    add_event(tx, request_id, "queued", message)
                    _note(tx, by, "job.submit", job)
                    return job, True
            except sa.exc.IntegrityError:
                if idempotency_key is not None:  # the same key won a race against us
                    earlier = self.replay(spec.org, idempotency_key, body_hash)
                    if earlier is not None:
                        return earlier, False
                self._require_free_name(spec.org, spec.experiment_name)
        raise _name_in_motion(spec.experiment_name)

    def _require_free_name(self, org_id: str, name: str) -> None:
        """Raise NameTaken unless the job that had the name a moment ago has ended since."""
        with self.read() as tx:
            other = self._holder(tx, org_id, name)
        if other is not None:
            raise NameTaken(name, other)

    def _holder(self, tx: Connection, org_id: str, name: str) -> str | None:
        same_name = (jobs.c.org_id == org_id) & (jobs.c.experiment_name == name)
        live = jobs.c.status.in_([Status.QUEUED, Status.RUNNING, Status.COMPLETED])
        return tx.execute(sa.select(jobs.c.request_id).where(same_name & live, OURS)).scalar()

    def replay(self, org_id: str, idempotency_key: str, body_hash: str) -> Job | None:
        """The job that this key made before, or None. Raises IdempotencyMismatch for another body."""
        with self.read() as tx:
            return self._earlier(tx, org_id, idempotency_key, body_hash, self._now())

    def forget_expired_keys(self, *, dry_run: bool = False) -> int:
        """Delete the idempotency keys that count no more, or only count them; how many there were."""
        expired = idempotency.c.created_at < self._now() - dt.timedelta(hours=IDEMPOTENCY_HOURS)
        if dry_run:
            with self.read() as tx:
                return int(tx.execute(sa.select(sa.func.count()).select_from(idempotency).where(expired)).scalar_one())
        with self.write() as tx:
            return int(tx.execute(sa.delete(idempotency).where(expired)).rowcount)

    def _earlier(self, tx: Connection, org: str, key: str, body_hash: str, now: dt.datetime) -> Job | None:
        mine = (idempotency.c.org_id == org) & (idempotency.c.key == key)
        found = tx.execute(sa.select(idempotency).where(mine)).one_or_none()
        if found is None or found.created_at < now - dt.timedelta(hours=IDEMPOTENCY_HOURS):
            return None
        if found.body_hash != body_hash:
            raise IdempotencyMismatch(f"this Idempotency-Key was used for another request (job {found.request_id})")
        return require(tx, found.request_id)

    def get(self, request_id: str, org_id: str | None = None) -> Job | None:
        """The job, or None when it doesn't exist or isn't the org's."""
        query = sa.select(*SHOWN).where(jobs.c.request_id == request_id)
        if org_id is not None:
            query = query.where(jobs.c.org_id == org_id)
        with self.read() as tx:
            row = tx.execute(query).one_or_none()
        return None if row is None else job_of(row)

    def list_jobs(
        self,
        org_id: str,
        *,
        status: Status | None = None,
        experiment_name: str | None = None,
        limit: int = 50,
        cursor: str | None = None,
    ) -> tuple[list[Job], str | None]:
        """One page, newest first, and the cursor of the next. Raises ValueError for a cursor that isn't ours."""
        query = sa.select(*SHOWN).where(jobs.c.org_id == org_id).order_by(jobs.c.seq.desc()).limit(limit + 1)
        if status is not None:
            query = query.where(jobs.c.status == status)
        if experiment_name is not None:
            query = query.where(jobs.c.experiment_name == experiment_name)
        if cursor is not None:
            query = query.where(jobs.c.seq < _seq_of(cursor))
        with self.read() as tx:
            found = [job_of(row) for row in tx.execute(query)]
        more = len(found) > limit
        page = found[:limit]
        return page, _cursor(page[-1].seq) if more else None

    def waiting(self, limit_per_org: int) -> list[Job]:
        """Jobs that want an attempt, oldest first: QUEUED ones, each org's foremost by priority and by age, and those between two
        attempts."""
        place, of = sa.func.row_number(), jobs.c.org_id
        by_priority = place.over(partition_by=of, order_by=[jobs.c.priority.desc(), jobs.c.seq]).label("by_priority")
        by_age = place.over(partition_by=of, order_by=[jobs.c.waiting_since, jobs.c.seq]).label("by_age")
        queued = sa.select(jobs.c.seq, by_priority, by_age).where(jobs.c.status == Status.QUEUED).subquery()
        foremost = sa.select(queued.c.seq).where((queued.c.by_priority <= limit_per_org) | (queued.c.by_age <= limit_per_org))
        between = (jobs.c.status == Status.RUNNING) & jobs.c.retry_at.is_not(None) & jobs.c.cancel_requested_at.is_(None)
        query = sa.select(jobs).where(jobs.c.seq.in_(foremost) | between, OURS).order_by(jobs.c.seq)
        with self.read() as tx:
            return [job_of(row) for row in tx.execute(query)]

    def running(self) -> list[Job]:
        """Jobs of the service that are RUNNING, oldest first, also those between two attempts."""
        query = sa.select(jobs).where(jobs.c.status == Status.RUNNING, OURS).order_by(jobs.c.seq)
        with self.read() as tx:
            return [job_of(row) for row in tx.execute(query)]

    def worked_since(self, since: dt.datetime) -> list[Job]:
        """Jobs of the service that had an attempt since then: under way, between two, back in the queue, or ended."""
        live = jobs.c.status.in_([Status.QUEUED, Status.RUNNING]) & (jobs.c.updated_at >= since)
        query = sa.select(jobs).where(OURS, jobs.c.attempt > 0, (jobs.c.completed_at >= since) | live)
        with self.read() as tx:
            return [job_of(row) for row in tx.execute(query)]

    def queue_positions(self, page: Sequence[Job]) -> dict[str, int]:
        """By request_id, for those that wait: 1 starts next; by order of arrival until the dispatcher has seen a job."""
        queued = jobs.c.status == Status.QUEUED
        known = {job.request_id: job.queue_position for job in page if job.status is Status.QUEUED and job.queue_position}
        fresh = {job.seq: job.request_id for job in page if job.status is Status.QUEUED and not job.queue_position}
        if not fresh:
            return known
        first, last = min(fresh), max(fresh)
        with self.read() as tx:
            ahead = _count(tx, queued & (jobs.c.seq < first))
            between = tx.execute(sa.select(jobs.c.seq).where(queued, jobs.c.seq.between(first, last)).order_by(jobs.c.seq))
            return known | {fresh[seq]: place for place, (seq,) in enumerate(between, ahead + 1) if seq in fresh}

    def set_queue_positions(self, positions: Mapping[str, int]) -> None:
        """Write places in the queue, by request_id; of a job that waits no more it is left alone."""
        query = (
            sa.update(jobs)
            .where(jobs.c.request_id == sa.bindparam("of"), jobs.c.status == Status.QUEUED)
            .values(queue_position=sa.bindparam("place"))
        )
        if positions:
            with self.write() as tx:
                tx.execute(query, [{"of": request_id, "place": place} for request_id, place in positions.items()])

    # --- what the cluster can hold ---

    def capacity(self) -> dict[str, int]:
        """By gpu_type, the most workers that the cluster could ever run at once; empty until the dispatcher has looked.

        At most CAPACITY_AGE_S old: every submission asks.
        """
        now = time.monotonic()
        if now > self._capacity_until:
            with self.read() as tx:
                self._capacity = {row.gpu_type: row.max_workers for row in tx.execute(sa.select(capacity))}
            self._capacity_until = now + CAPACITY_AGE_S
        return self._capacity

    def set_capacity(self, found: Mapping[str, int]) -> None:
        """Replace what `capacity` says."""
        self._capacity_until = 0.0
        with self.write() as tx:
            tx.execute(sa.delete(capacity))
            if found:
                tx.execute(sa.insert(capacity), [{"gpu_type": name, "max_workers": most} for name, most in found.items()])

    # --- state changes ---

    def start_attempt(self, request_id: str, expected_attempt: int, num_nodes: int) -> Job | None:
        """QUEUED, or between two attempts → RUNNING with the next attempt open; None when that isn't so any more."""
        now, attempt = self._now(), expected_attempt + 1
        with self.write() as tx:
            job = require(tx, request_id)
            ready = job.status is Status.QUEUED or (job.status is Status.RUNNING and job.retry_at is not None)
            if not ready or job.attempt != expected_attempt or job.cancel_requested or tx.execute(sa.select(PAUSED)).scalar():
                return None
            workers = job.spec["infra_config"]["gpu_count"] * num_nodes
            where = f"on {workers} worker{'s' if workers > 1 else ''}"
            values = {
                "status": Status.RUNNING,
                "phase": Phase.PREPARING_DATA,
                "attempt": attempt,
                "message": f"Running {where}." if attempt == 1 else f"Running {where}, attempt {attempt}.",
                "num_nodes": num_nodes,
                "actor_node": None,
                "queue_position": None,
                "retry_at": None,
                "yield_requested_at": None,
                "started_at": job.started_at or now,
                "heartbeat_at": None,
                "updated_at": now,
            }
            add_event(tx, request_id, "started", f"attempt {attempt} {where}")
            return job_of(
                tx.execute(sa.update(jobs).where(jobs.c.request_id == request_id).values(**values).returning(jobs)).one()
            )

    def report(self, request_id: str, attempt: int, notes: Notes | None = None, **fields: Any) -> Job:
        """Write progress, notes and a heartbeat; the job in return says whether to stop. Raises StaleAttempt."""
        now = self._now()
        with self.write() as tx:
            job = _require_attempt(tx, request_id, attempt)
            if notes:
                add_notes(tx, request_id, attempt, notes)
            if "ran_s" in fields:
                fields["worker_s"] = job.worker_s + max(0.0, fields["ran_s"] - job.ran_s) * job.num_workers
            tx.execute(sa.update(jobs).where(jobs.c.request_id == request_id).values(**fields, heartbeat_at=now, updated_at=now))
            return require(tx, request_id)

    def record_fault(self, request_id: str, attempt: int, cause: Cause, message: str) -> Job:
        """Close an attempt that a fault has ended: another one comes, or the job is FAILED. Raises StaleAttempt.

        Want of room is no fault: the job keeps the place in the queue that it had before.
        """
        now = self._now()
        with self.write() as tx:
            job = _require_attempt(tx, request_id, attempt)
            verdict = judge(
                cause,
                faults=job.faults,
                losses=job.losses,
                progressed=job.step > job.fault_step,
                max_retries=job.spec["infra_config"]["max_retries"],
                last_cause=job.fault_cause,
            )
            values: dict[str, Any] = {"faults": verdict.faults, "losses": verdict.losses, "updated_at": now}
            if cause is not Cause.NO_ROOM:
                # An attempt that got less far than one before is no progress.
                values["fault_step"] = max(job.step, job.fault_step)
                values["fault_cause"], values["waiting_since"] = str(cause), now
            if verdict.retry or job.cancel_requested:
                text = f"Attempt {attempt} ended: {message} {verdict.sentence}"
                values |= {"retry_at": now + dt.timedelta(seconds=verdict.wait_s), "heartbeat_at": None}
                values |= {"phase": Phase.WAITING_FOR_RESOURCES, "message": text, "eta_s": None}
            else:
                check(job.status, Status.FAILED)
                text = f"{message} {verdict.sentence}"
                values |= {"status": Status.FAILED, "message": text, "completed_at": now}
                values |= {"error_code": str(cause), "error_message": text}
            tx.execute(sa.update(jobs).where(jobs.c.request_id == request_id).values(**values))
            add_event(tx, request_id, str(cause), text)
            return announced(tx, request_id)

    def refuse(self, request_id: str, code: str, message: str) -> Job:
        """QUEUED, or between two attempts → FAILED, for a job that no attempt can ever be made of. Raises StaleAttempt."""
        now = self._now()
        with self.write() as tx:
            job = require(tx, request_id)
            if job.status is not Status.QUEUED and not (job.status is Status.RUNNING and job.retry_at is not None):
                raise StaleAttempt(f"job {request_id} is {job.status}")
            values = {"status": Status.FAILED, "message": message, "error_code": code, "error_message": message}
            ended = {"retry_at": None, "completed_at": now, "updated_at": now}
            tx.execute(sa.update(jobs).where(jobs.c.request_id == request_id).values(**values, **ended))
            add_event(tx, request_id, "failed", message)
            return announced(tx, request_id)

    def cancel_ended(self, request_id: str, attempt: int, message: str) -> Job:
        """RUNNING with a wish to cancel → CANCELED, once nothing of the run is left; again is harmless. Raises StaleAttempt."""
        now = self._now()
        with self.write() as tx:
            job = require(tx, request_id)
            if job.status is Status.CANCELED:
                return job
            if job.status is not Status.RUNNING or job.attempt != attempt or not job.cancel_requested:
                raise StaleAttempt(f"job {request_id} is {job.status} in attempt {job.attempt}, not {attempt}")
            ended = {"status": Status.CANCELED, "message": message, "retry_at": None, "completed_at": now, "updated_at": now}
            tx.execute(sa.update(jobs).where(jobs.c.request_id == request_id).values(**ended))
            add_event(tx, request_id, "canceled", message)
            return announced(tx, request_id)

    def finish(self, request_id: str, attempt: int, status: Status, *, message: str, **fields: Any) -> Job:
        """An open attempt → a final state. Again with the same state changes nothing. Raises StaleAttempt, IllegalTransition."""
        now = self._now()
        with self.write() as tx:
            job = require(tx, request_id)
            if job.attempt == attempt and job.status is status:
                return job
            job = _require_attempt(tx, request_id, attempt)
            check(job.status, status)
            ended = {"status": status, "message": message, "completed_at": now, "updated_at": now, **fields}
            tx.execute(sa.update(jobs).where(jobs.c.request_id == request_id).values(**ended))
            add_event(tx, request_id, status.lower(), message)
            return announced(tx, request_id)

    def ask_to_yield(self, request_id: str, attempt: int, message: str, by: By | None = None) -> Job:
        """Have a RUNNING job save and go back to the queue; the dispatcher sees to it. Again is harmless.

        Raises StaleAttempt, NotResumable.
        """
        now = self._now()
        with self.write() as tx:
            job = _require_ours(tx, request_id)
            if job.status is not Status.RUNNING or job.attempt != attempt or job.cancel_requested:
                raise StaleAttempt(f"job {request_id} is {job.status} in attempt {job.attempt}, not {attempt}, or to be canceled")
            if job.yield_requested_at is None:
                tx.execute(sa.update(jobs).where(jobs.c.request_id == request_id).values(yield_requested_at=now, updated_at=now))
                add_event(tx, request_id, "yield_requested", message)
            _note(tx, by, "admin.requeue", job)
            return require(tx, request_id)

    def give_back(self, request_id: str, attempt: int) -> Job:
        """RUNNING and asked to yield → QUEUED in its old place, once nothing of the run is left. Raises StaleAttempt.

        That is no fault, and no resume: what counts against the job's limits stays as it is.
        """
        message = "Back in the queue, as the operator asked: it goes on from its last checkpoint, if it has one."
        with self.write() as tx:
            job = require(tx, request_id)
            asked = job.yield_requested_at is not None and not job.cancel_requested
            if job.status is not Status.RUNNING or job.attempt != attempt or not asked:
                raise StaleAttempt(f"job {request_id} is {job.status} in attempt {job.attempt}, not {attempt}, or isn't to yield")
            check(job.status, Status.QUEUED)
            values = {"status": Status.QUEUED, "phase": Phase.QUEUED, "message": message, "updated_at": self._now()}
            gone = {"yield_requested_at": None, "retry_at": None, "heartbeat_at": None, "eta_s": None}
            tx.execute(sa.update(jobs).where(jobs.c.request_id == request_id).values(**values, **gone))
            add_event(tx, request_id, "requeued", message)
            return require(tx, request_id)

    def resume(self, request_id: str, max_queued: int | None = None, by: By | None = None, action: str = "job.resume") -> Job:
        """FAILED or CANCELED → QUEUED, to go on from its last checkpoint.

        Raises NotResumable, NameTaken, QueueFull when the org has `max_queued` waiting jobs, or as many as its own quota says
        (None: no limit at all).
        """
        now = self._now()
        message = "Queued again: it goes on from its last checkpoint, if it has one."
        values: dict[str, Any] = {
            "status": Status.QUEUED,
            "phase": Phase.QUEUED,
            "message": message,
            "waiting_since": now,
            "cancel_requested_at": None,
            "yield_requested_at": None,
            "journal_removed_at": None,
            "completed_at": None,
            "error_code": None,
            "error_message": None,
            "updated_at": now,
            **{"faults": 0, "losses": 0, "fault_step": jobs.c.step, "fault_cause": None, "ran_s": 0.0},
        }
        for _ in range(NAME_TRIES):
            try:
                with self.write() as tx:
                    job = _require_ours(tx, request_id)
                    if job.status not in RESUMABLE:
                        raise NotResumable(f"job {request_id} is {job.status}: only a FAILED or CANCELED one can be resumed")
                    _require_room(tx, job.org_id, max_queued)
                    tx.execute(sa.update(jobs).where(jobs.c.request_id == request_id).values(**values))
                    add_event(tx, request_id, "resume_requested", message)
                    _note(tx, by, action, job)
                    return require(tx, request_id)
            except sa.exc.IntegrityError:
                self._require_free_name(job.org_id, job.experiment_name)
        raise _name_in_motion(job.experiment_name)

    def request_cancel(self, request_id: str, by: By | None = None) -> Job:
        """QUEUED → CANCELED at once; RUNNING is asked to stop; CANCELED stays. Raises AlreadyFinal."""
        now = self._now()
        with self.write() as tx:
            job = require(tx, request_id)
            if job.status is Status.CANCELED or (job.status is Status.RUNNING and job.cancel_requested):
                return job
            if job.status in FINAL:
                raise AlreadyFinal(f"job {request_id} is {job.status}: it can't be canceled any more")
            values: dict[str, Any] = {"cancel_requested_at": now, "updated_at": now}
            if job.status is Status.QUEUED:
                values |= {"status": Status.CANCELED, "message": "Canceled before it started.", "completed_at": now}
            tx.execute(sa.update(jobs).where(jobs.c.request_id == request_id).values(**values))
            add_event(tx, request_id, "cancel_requested", "cancel requested")
            _note(tx, by, "job.cancel", job)
            return announced(tx, request_id)

    # --- the dispatcher's lease ---

    def acquire_lease(self, name: str, owner: str, ttl_s: float) -> int | None:
        """Take or renew the lease; its epoch, or None while another owner holds it."""
        now = self._now()
        expires = now + dt.timedelta(seconds=ttl_s)
        try:
            with self.write() as tx:
                held = tx.execute(sa.select(leases).where(leases.c.name == name).with_for_update()).one_or_none()
                if held is None:
                    tx.execute(sa.insert(leases).values(name=name, owner=owner, epoch=1, expires_at=expires))
                    return 1
                if held.owner != owner and held.expires_at > now:
                    return None
                epoch = held.epoch if held.owner == owner else held.epoch + 1
                values = {"owner": owner, "epoch": epoch, "expires_at": expires}
                tx.execute(sa.update(leases).where(leases.c.name == name).values(**values))
                return int(epoch)
        except sa.exc.IntegrityError:  # two inserted at once; the other one has it
            return None


def _replace_dead_connections(engine: Engine) -> None:
    """Have a connection that wasn't used for PROVEN_S asked, before it is used, whether it is there still, and replaced if not.

    SQLAlchemy's pool_pre_ping asks each time, a round trip of every request. Where the database came back within that time, one
    request fails, as with any that was under way, and the pool drops all its connections.
    """

    @sa.event.listens_for(engine, "checkin")
    def _used(connection: Any, record: Any) -> None:
        record.info["used_at"] = time.monotonic()

    @sa.event.listens_for(engine, "checkout")
    def _ask(connection: Any, record: Any, proxy: Any) -> None:
        if time.monotonic() - record.info.get("used_at", math.inf) > PROVEN_S:
            try:
                engine.dialect.do_ping(connection)
            except engine.dialect.loaded_dbapi.Error:
                raise sa.exc.InvalidatePoolError from None


def _leave_standbys(engine: Engine) -> None:
    """Have a server that takes no writes count as away, and the connections to it as lost.

    The address may lead to what is a standby since a failover, for the moment; or the server's disk is nearly full.
    """

    @sa.event.listens_for(engine, "handle_error")
    def _judge(context: sa.engine.ExceptionContext) -> Exception | None:
        original = context.original_exception
        if getattr(original, "sqlstate", None) != READ_ONLY:
            return None
        context.is_disconnect = True
        return sa.exc.OperationalError(context.statement, context.parameters, original)


def _cursor(seq: int) -> str:
    return base64.urlsafe_b64encode(str(seq).encode()).decode()


def _seq_of(cursor: str) -> int:
    """The other way round. Raises ValueError for what isn't a cursor of ours."""
    seq = int(base64.urlsafe_b64decode(cursor.encode()).decode())
    if _cursor(seq) != cursor or not 0 <= seq <= MAX_SEQ:
        raise ValueError(cursor)
    return seq


def _count(tx: Connection, where: sa.ColumnElement[bool]) -> int:
    return int(tx.execute(sa.select(sa.func.count()).select_from(jobs).where(where)).scalar_one())


def _require_room(tx: Connection, org_id: str, max_queued: int | None) -> None:
    """Raise QueueFull when the org has `max_queued` waiting jobs, or as many as its own quota says; None is no limit at all."""
    if max_queued is None:
        return
    waiting = sa.select(sa.func.count()).select_from(jobs).where(jobs.c.org_id == org_id, jobs.c.status == Status.QUEUED)
    own = sa.select(quotas.c.max_queued_jobs).where(quotas.c.org_id == org_id)
    asked = sa.select(waiting.scalar_subquery(), own.scalar_subquery())
    count, quota = tx.execute(asked).one()
    most = max_queued if quota is None else quota
    if count < most - NEARLY_FULL:
        return
    if tx.dialect.name == "postgresql":
        # Others add jobs at the same time: near the limit one after the other. Elsewhere that would cost each its own fsync.
        tx.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.func.hashtextextended(org_id, 0))))
        count = tx.execute(waiting).scalar_one()
    if count >= most:
        raise QueueFull(f"{most} jobs of this org are waiting already; try again when one has started")


def _note(tx: Connection, by: By | None, action: str, job: Job) -> None:
    """Have it in the audit log, where somebody asked for it."""
    if by is not None:
        add_entry(tx, by, action, job.request_id, org_id=job.org_id)


def _name_in_motion(name: str) -> Conflict:
    return Conflict(f"experiment_name {name} goes from job to job at this moment: try again")


def require(tx: Connection, request_id: str) -> Job:
    """The job that is there, held until the transaction ends."""
    return job_of(tx.execute(sa.select(jobs).where(jobs.c.request_id == request_id).with_for_update()).one())


def _require_ours(tx: Connection, request_id: str) -> Job:
    job = require(tx, request_id)
    if job.ray_job is not None:
        raise NotResumable(
            f"job {request_id} was started outside the service, as Ray job {job.ray_job}: to go on from its last checkpoint, "
            f"ray job submit it again with --request-id {request_id}"
        )
    return job


def announced(tx: Connection, request_id: str) -> Job:
    """The job that was just changed; if that ended it, the org's webhooks are to be told."""
    job = require(tx, request_id)
    if job.status in FINAL:
        announce(tx, job)
    return job


def _require_attempt(tx: Connection, request_id: str, attempt: int) -> Job:
    job = require(tx, request_id)
    if job.attempt != attempt or not job.open:
        raise StaleAttempt(f"job {request_id} is {job.status} in attempt {job.attempt}, not {attempt}, or that one is closed")
    return job
