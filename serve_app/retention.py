"""What of finished jobs goes after a time, as the operator's settings have it: their journals in the store, their checkpoints.

Job by job, each once: what was removed is written down with the job, in the same transaction where it can be. Where a process
ends in between, the next turn does the rest.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serve_app.lifecycle import FINAL, Status
from serve_app.settings import Settings
from serve_app.storage import run_uri, storage_credentials
from serve_app.store.jobs import JobStore
from serve_app.store.journal import add_event
from serve_app.store.tables import OURS, job_events, job_logs, job_metrics, jobs
from train_loop.data.sources import filesystem_for
from train_loop.layout import CHECKPOINTS
from train_loop.storage import delete_folder

BATCH = 100


def remove_journals(settings: Settings, store: JobStore, *, dry_run: bool = False) -> int:
    """Remove log lines, events and points of jobs that ended long enough ago; of how many."""
    if settings.keep_journal_days is None:
        return 0
    count, days = 0, settings.keep_journal_days
    for request_id, _ in _ended(store, days, jobs.c.journal_removed_at, jobs.c.status.in_(FINAL)):
        if not dry_run:
            with store.write() as tx:
                _remove_journal(tx, request_id, days)
        count += 1
    return count


def _remove_journal(tx: Connection, request_id: str, days: float) -> None:
    job = jobs.c.request_id == request_id
    if tx.execute(sa.select(jobs.c.status).where(job).with_for_update()).scalar_one() not in FINAL:
        return  # resumed a moment ago
    for table in (job_logs, job_metrics, job_events):
        tx.execute(sa.delete(table).where(table.c.request_id == request_id))
    said = f"What the job logged, its points and earlier events were removed {days:g} days after its end."
    add_event(tx, request_id, "journal_removed", said)
    tx.execute(sa.update(jobs).where(job).values(journal_removed_at=dt.datetime.now(dt.UTC)))


def remove_checkpoints(settings: Settings, store: JobStore, *, dry_run: bool = False) -> int:
    """Remove the checkpoints of jobs that were completed long enough ago; of how many jobs. What they trained stays.

    Those of runs outside the service are their owners' to remove.
    """
    if settings.keep_checkpoints_days is None:
        return 0
    count, keys = 0, storage_credentials(settings)
    days, which = settings.keep_checkpoints_days, (jobs.c.status == Status.COMPLETED, OURS)
    for request_id, org_id in _ended(store, days, jobs.c.checkpoints_removed_at, *which):
        if not dry_run:
            storage, path = filesystem_for(run_uri(settings, org_id, request_id), keys)
            delete_folder(storage, f"{path}/{CHECKPOINTS}")
            removed = sa.update(jobs).where(jobs.c.request_id == request_id)
            with store.write() as tx:
                tx.execute(removed.values(checkpoints_removed_at=dt.datetime.now(dt.UTC)))
        count += 1
    return count


def _ended(
    store: JobStore, days: float, removed_at: sa.Column[dt.datetime], *which: sa.ColumnElement[bool]
) -> Iterator[tuple[str, str]]:
    """request_id and org_id of such jobs that ended so long ago and of which nothing was removed yet."""
    before = dt.datetime.now(dt.UTC) - dt.timedelta(days=days)
    due = (*which, jobs.c.completed_at < before, removed_at.is_(None))
    last = 0
    while True:
        query = sa.select(jobs.c.seq, jobs.c.request_id, jobs.c.org_id).where(*due, jobs.c.seq > last)
        with store.read() as tx:
            found = tx.execute(query.order_by(jobs.c.seq).limit(BATCH)).all()
        if not found:
            return
        yield from ((request_id, org_id) for _, request_id, org_id in found)
        last = found[-1].seq
