"""What a job leaves behind while it runs: events, metric points, log lines. Appended by its attempts, read by anyone later."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serve_app.store.tables import job_events, job_logs, job_metrics

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


@dataclass(frozen=True)
class Notes:
    """What an attempt has to tell since it last did."""

    events: Sequence[tuple[str, str]] = ()  # kind, message
    points: Sequence[dict[str, Any]] = ()  # one of a step that is there already, from before a restart, replaces it
    lines: Sequence[tuple[int, float, str]] = ()  # rank, Unix time, text

    def __bool__(self) -> bool:
        return bool(self.events or self.points or self.lines)


def add_event(tx: Connection, request_id: str, kind: str, message: str) -> None:
    """Append an event as part of the state change it tells of."""
    tx.execute(sa.insert(job_events).values(request_id=request_id, time=dt.datetime.now(dt.UTC), kind=kind, message=message))


def add_notes(tx: Connection, request_id: str, attempt: int, notes: Notes) -> None:
    """Append an attempt's notes; of a job's lines the newest MAX_LOG_LINES stay.

    The caller holds the job's row: a job's writers must commit in the order of their ids, for a follower asks for ids above its
    last and would miss a late one.
    """
    for kind, message in notes.events:
        add_event(tx, request_id, kind, message)
    if notes.points:
        rows = {p["step"]: {"request_id": request_id, "step": p["step"], "point": p} for p in notes.points}
        same = job_metrics.c.step.in_(list(rows))
        tx.execute(sa.delete(job_metrics).where(job_metrics.c.request_id == request_id, same))
        tx.execute(sa.insert(job_metrics), list(rows.values()))
    if notes.lines:
        lines = [
            {
                "request_id": request_id,
                "attempt": attempt,
                "rank": rank,
                "time": dt.datetime.fromtimestamp(time, dt.UTC),
                "line": line,
            }
            for rank, time, line in notes.lines
        ]
        tx.execute(sa.insert(job_logs), lines)
        mine = job_logs.c.request_id == request_id
        oldest = sa.select(job_logs.c.id).where(mine).order_by(job_logs.c.id.desc()).offset(MAX_LOG_LINES).limit(1)
        tx.execute(sa.delete(job_logs).where(mine, job_logs.c.id <= oldest.scalar_subquery()))


class Journal:
    """Events, points and lines by request_id. Whoever reads knows already that the job is theirs."""

    def __init__(self, read: Callable[[], AbstractContextManager[Connection]]) -> None:
        self._read = read

    def events(self, request_id: str, after: int = 0, limit: int = 1000) -> list[Event]:
        """Events with an id above `after`, oldest first."""
        query = sa.select(job_events).where(job_events.c.request_id == request_id, job_events.c.id > after)
        with self._read() as tx:
            return [Event(e.id, e.time, e.kind, e.message) for e in tx.execute(query.order_by(job_events.c.id).limit(limit))]

    def points(self, request_id: str, after_step: int = -1, limit: int = 10_000) -> list[dict[str, Any]]:
        """Metric points of steps above `after_step`, in order."""
        mine = (job_metrics.c.request_id == request_id) & (job_metrics.c.step > after_step)
        with self._read() as tx:
            return list(
                tx.execute(sa.select(job_metrics.c.point).where(mine).order_by(job_metrics.c.step).limit(limit)).scalars()
            )

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
