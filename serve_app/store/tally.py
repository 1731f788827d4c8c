"""Counts over all jobs, for metrics: each is one statement on an index."""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serve_app.lifecycle import Status
from serve_app.store.tables import job_events, jobs

OVERLAP = 200  # ids are given out before their transactions commit: a later one may be seen first


def count_jobs(tx: Connection, statuses: Collection[Status]) -> dict[tuple[Status, str], int]:
    """By status and org, how many jobs there are of these statuses."""
    query = sa.select(jobs.c.status, jobs.c.org_id, sa.func.count()).where(jobs.c.status.in_(statuses))
    return {(Status(status), org): count for status, org, count in tx.execute(query.group_by(jobs.c.org_id, jobs.c.status))}


def oldest_queued(tx: Connection) -> dt.datetime | None:
    """Since when the job waits that has been QUEUED for longest."""
    found: dt.datetime | None = tx.execute(
        sa.select(sa.func.min(jobs.c.waiting_since)).where(jobs.c.status == Status.QUEUED)
    ).scalar_one()
    return found


class NewEvents:
    """The events of some kinds, of all jobs, as they come: each once. What was there before the first look is left out."""

    def __init__(self, kinds: Collection[str]) -> None:
        self._kinds = kinds
        self._last: int | None = None
        self._seen = set[int]()

    def take(self, tx: Connection) -> list[tuple[str, str]]:
        """Kind and message of those that are new since the last call."""
        newest = sa.select(sa.func.coalesce(sa.func.max(job_events.c.id), 0))
        last = int(tx.execute(newest).scalar_one())
        from_id = (last if self._last is None else self._last) - OVERLAP
        query = sa.select(job_events.c.id, job_events.c.kind, job_events.c.message)
        near = query.where(job_events.c.id > from_id, job_events.c.kind.in_(self._kinds)).order_by(job_events.c.id)
        fresh = [row for row in tx.execute(near) if row.id not in self._seen]
        first, self._last = self._last is None, last
        self._seen = {id_ for id_ in self._seen | {row.id for row in fresh} if id_ > last - OVERLAP}
        return [] if first else [(row.kind, row.message) for row in fresh]
