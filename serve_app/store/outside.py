"""Runs that `ray job submit` started outside the service, as rows of jobs: shown like jobs, and never scheduled.

Such a run isn't ours to start, to restart or to fence; a row only keeps what was heard of it. It takes no name, no place in the
queue and none of a quota. Another run with the same request_id goes on from its checkpoint, and so goes on with its row.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from serve_app.lifecycle import FINAL, Phase, Status, check
from serve_app.store.jobs import Job, announced, job_of, new_row, require
from serve_app.store.journal import Notes, add_event, add_notes
from serve_app.store.tables import OURS, jobs
from train_loop.spec import JobSpec

# A version that knows of no such runs takes this one for a job between two attempts, the next of which never comes.
NEVER = dt.datetime(9999, 1, 1, tzinfo=dt.UTC)


@dataclass(frozen=True)
class Ending:
    """How a run has ended."""

    status: Status
    message: str
    output_model_path: str | None = None
    error_code: str | None = None
    error_message: str | None = None


@dataclass(frozen=True)
class Heard:
    """What a run has told since `asked`, the cursor of the time before; `live` are the columns that it says something of."""

    request_id: str
    ray_job: str
    spec: JobSpec
    asked: str
    cursor: str
    live: Mapping[str, Any]
    notes: Notes
    ending: Ending | None


def cursors(tx: Connection, request_ids: Collection[str]) -> dict[str, str]:
    """By request_id, up to where each of these runs was heard; "" of one that isn't there yet, nothing of what is no such run."""
    query = sa.select(jobs.c.request_id, jobs.c.ray_cursor).where(jobs.c.request_id.in_(request_ids))
    known = {row.request_id: row.ray_cursor for row in tx.execute(query)}
    found = {request_id: known.get(request_id, "") for request_id in request_ids}
    return {request_id: cursor for request_id, cursor in found.items() if cursor is not None}


def running(tx: Connection) -> list[Job]:
    """Those that go on, as far as is known."""
    query = sa.select(jobs).where(jobs.c.status == Status.RUNNING, ~OURS).order_by(jobs.c.seq)
    return [job_of(row) for row in tx.execute(query)]


def hear(tx: Connection, heard: Heard, now: dt.datetime) -> Job | None:
    """Write down what a run has told, also that it has begun; its row.

    None where nothing was written: another dispatcher was faster, or the row is a job of the service's or of another org. One
    that is COMPLETED stays as it is, also when it is run again: that finds all done.
    """
    mine = jobs.c.request_id == heard.request_id
    row = tx.execute(sa.select(jobs).where(mine).with_for_update()).one_or_none()
    if row is None:
        message = _running(heard.ray_job)
        began = {"status": Status.RUNNING, "phase": Phase.PREPARING_DATA, "attempt": 1, "started_at": now, "retry_at": NEVER}
        outside = {"ray_job": heard.ray_job, "ray_cursor": ""}
        tx.execute(sa.insert(jobs).values(**new_row(heard.spec, heard.request_id, message, now) | began | outside))
        add_event(tx, heard.request_id, "started", f"outside the service, as Ray job {heard.ray_job}")
        job = require(tx, heard.request_id)
    else:
        job = job_of(row)
        if job.ray_cursor != heard.asked or job.org_id != heard.spec.org:
            return None
        is_new = _record(job.ray_cursor) != _record(heard.cursor)
        if job.status is Status.COMPLETED or (job.status in FINAL and not is_new):
            tx.execute(sa.update(jobs).where(mine).values(ray_cursor=heard.cursor))
            return require(tx, heard.request_id)
        job = _again(tx, job, heard, now) if is_new else job
    add_notes(tx, heard.request_id, job.attempt, heard.notes)
    told = {"ray_cursor": heard.cursor, "heartbeat_at": now, "updated_at": now}
    tx.execute(sa.update(jobs).where(mine).values(**heard.live, **told))
    return require(tx, heard.request_id) if heard.ending is None else end(tx, heard.request_id, heard.ending, now)


def end(tx: Connection, request_id: str, ending: Ending, now: dt.datetime) -> Job:
    """RUNNING → a final state; one that is there already stays."""
    job = require(tx, request_id)
    if job.status in FINAL:
        return job
    check(job.status, ending.status)
    values = {"status": ending.status, "message": ending.message, "output_model_path": ending.output_model_path}
    failed = {"error_code": ending.error_code, "error_message": ending.error_message}
    gone = {"eta_s": None, "retry_at": None, "completed_at": now, "updated_at": now}
    tx.execute(sa.update(jobs).where(jobs.c.request_id == request_id).values(**values, **failed, **gone))
    add_event(tx, request_id, ending.status.lower(), ending.message)
    return announced(tx, request_id)


def _again(tx: Connection, job: Job, heard: Heard, now: dt.datetime) -> Job:
    """The row of another run with the same request_id, which goes on where the one before has ended."""
    began = {"status": Status.RUNNING, "phase": Phase.PREPARING_DATA, "attempt": job.attempt + 1, "retry_at": NEVER}
    what = {"ray_job": heard.ray_job, "message": _running(heard.ray_job), "experiment_name": heard.spec.experiment_name}
    fresh = ("cancel_requested_at", "completed_at", "journal_removed_at", "error_code", "error_message")
    values = {**began, **what, "spec": heard.spec.model_dump(mode="json"), **dict.fromkeys(fresh)}
    tx.execute(sa.update(jobs).where(jobs.c.request_id == job.request_id).values(**values))
    add_event(tx, job.request_id, "started", f"outside the service, again, as Ray job {heard.ray_job}")
    return require(tx, job.request_id)


def _running(ray_job: str) -> str:
    return f"Running outside the service, as Ray job {ray_job}."


def _record(cursor: str | None) -> str:
    """Which record a cursor is of: see train_loop.record."""
    return (cursor or "").partition(":")[0]
