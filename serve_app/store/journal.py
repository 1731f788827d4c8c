"""What a job leaves behind while it runs: events, metric points, log lines. Appended by its actor, read by anyone later."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serve_app.store.tables import job_events, job_logs, job_metrics, jobs

MAX_LOG_LINES = 20_000  # kept of a job, the newest


@dataclass(frozen=True)
class Event:
    """One line of a job's event log."""

    id: int
    time: dt.datetime
    kind: str
    message: str


@dataclass(frozen=True)
class LogLine:
    """One line of a worker's log."""

    id: int
    time: dt.datetime
    attempt: int
    rank: int
    line: str


def add_event(tx: Connection, request_id: str, kind: str, message: str) -> None:
    """Append an event as part of the state change it tells of."""
    tx.execute(sa.insert(job_events).values(request_id=request_id, time=dt.datetime.now(dt.UTC), kind=kind, message=message))


def _in_turn(tx: Connection, request_id: str) -> None:
    """Let a job's writers commit in the order of their ids: a follower asks for ids above its last and would miss a late one."""
    tx.execute(sa.select(jobs.c.seq).where(jobs.c.request_id == request_id).with_for_update())


class Journal:
    """Events, points and lines by request_id. Whoever reads knows already that the job is theirs."""

    def __init__(
        self,
        read: Callable[[], AbstractContextManager[Connection]],
        write: Callable[[], AbstractContextManager[Connection]],
    ) -> None:
        self._read, self._write = read, write

    def add_event(self, request_id: str, kind: str, message: str) -> None:
        """Append an event."""
        with self._write() as tx:
            _in_turn(tx, request_id)
            add_event(tx, request_id, kind, message)

    def events(self, request_id: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events with an id above `after`, oldest first."""
        query = sa.select(job_events).where(job_events.c.request_id == request_id, job_events.c.id > after)
        with self._read() as tx:
            return [Event(e.id, e.time, e.kind, e.message) for e in tx.execute(query.order_by(job_events.c.id).limit(limit))]

    def add_points(self, request_id: str, points: Sequence[dict[str, Any]]) -> None:
        """Write metric points; one of the same step, from before a restart, is replaced."""
        if not points:
            return
        rows = {p["step"]: {"request_id": request_id, "step": p["step"], "point": p} for p in points}
        same = job_metrics.c.step.in_(list(rows))
        with self._write() as tx:
            tx.execute(sa.delete(job_metrics).where(job_metrics.c.request_id == request_id, same))
            tx.execute(sa.insert(job_metrics), list(rows.values()))

    def points(self, request_id: str, after_step: int = -1, limit: int = 10_000) -> list[dict[str, Any]]:
        """Metric points of steps above `after_step`, in order."""
        mine = (job_metrics.c.request_id == request_id) & (job_metrics.c.step > after_step)
        with self._read() as tx:
            return list(
                tx.execute(sa.select(job_metrics.c.point).where(mine).order_by(job_metrics.c.step).limit(limit)).scalars()
            )

    def add_log(self, request_id: str, attempt: int, rank: int, lines: Sequence[tuple[float, str]]) -> None:
        """Append a worker's lines (Unix time, text); of a job's lines the newest MAX_LOG_LINES stay."""
        if not lines:
            return
        where = {"request_id": request_id, "attempt": attempt, "rank": rank}
        rows = [where | {"time": dt.datetime.fromtimestamp(time, dt.UTC), "line": line} for time, line in lines]
        mine = job_logs.c.request_id == request_id
        with self._write() as tx:
            _in_turn(tx, request_id)
            tx.execute(sa.insert(job_logs), rows)
            oldest = sa.select(job_logs.c.id).where(mine).order_by(job_logs.c.id.desc()).offset(MAX_LOG_LINES).limit(1)
            tx.execute(sa.delete(job_logs).where(mine, job_logs.c.id <= oldest.scalar_subquery()))

    def log(
        self, request_id: str, *, rank: int | None = None, after: int = 0, tail: int | None = None, limit: int = 1000
    ) -> list[LogLine]:
        """Lines with an id above `after`, oldest first; `tail` gives the last ones instead of the first."""
        query = sa.select(job_logs).where(job_logs.c.request_id == request_id, job_logs.c.id > after)
        if rank is not None:
            query = query.where(job_logs.c.rank == rank)
        newest_first = tail is not None
        query = query.order_by(job_logs.c.id.desc() if newest_first else job_logs.c.id).limit(limit if tail is None else tail)
        with self._read() as tx:
            found = [LogLine(row.id, row.time, row.attempt, row.rank, row.line) for row in tx.execute(query)]
        return found[::-1] if newest_first else found
