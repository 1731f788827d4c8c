"""Whether jobs start, and jobs that are to start again."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve_app.cli.admin.common import admin_app, me, opened
from serve_app.cli.common import AsJson, RequestId, die, plain, show, uuid_of

if TYPE_CHECKING:
    from serve_app.store.jobs import Job, JobStore

LOOK_S = 1.0
OPERATOR = "The operator has asked the job to save and go back to the queue."


def _tell(store: JobStore, as_json: bool) -> int:
    """Say where things stand; how many attempts are under way."""
    from serve_app.store import pauses

    with store.read() as tx:
        pause = pauses.current(tx)
    jobs = store.running()
    busy = len([job for job in jobs if job.open])
    if as_json:
        since = pause and pause.since.isoformat(timespec="seconds")
        told: dict[str, Any] = {"paused": pause is not None, "drains": pause is not None and pause.drains, "since": since}
        show(told | {"by": pause and pause.who, "running": busy, "waiting_for_retry": len(jobs) - busy})
    elif pause is None:
        typer.echo(f"jobs start; {_count(busy)} running")
    else:
        since, who = f"{pause.since:%Y-%m-%d %H:%M:%S} UTC", plain(pause.who)
        drains = ", those that run save and go back to the queue" if pause.drains else ""
        typer.echo(f"paused since {since} by {who}: no job starts{drains}; {_count(busy)} running")
    return busy


def _count(jobs: int) -> str:
    return f"{jobs} job{'' if jobs == 1 else 's'}"


def _begin(store: JobStore, *, drains: bool) -> None:
    from serve_app.store import pauses
    from serve_app.store.audit import add_entry

    with store.write() as tx:
        pauses.begin(tx, by := me(), drains=drains)
        add_entry(tx, by, "admin.drain" if drains else "admin.pause")


@admin_app.command()
def pause(as_json: AsJson = False) -> None:
    """Let no job start; those that run go on, and submissions are taken. After a drain: no more jobs are asked to stop."""
    _, store = opened()
    _begin(store, drains=False)
    _tell(store, as_json)


@admin_app.command()
def unpause(as_json: AsJson = False) -> None:
    """Let jobs start again, after a pause or a drain. Without one it only says how things stand."""
    from serve_app.store import pauses
    from serve_app.store.audit import add_entry

    _, store = opened()
    with store.write() as tx:
        if pauses.end(tx):
            add_entry(tx, me(), "admin.unpause")
    _tell(store, as_json)


@admin_app.command()
def drain(
    wait_s: Annotated[int, typer.Option(min=0, help="Wait so long until nothing runs; status 1 when something does then.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Pause, and have running jobs save and go back to the queue, each to its old place; unpause lets them go on."""
    _, store = opened()
    _begin(store, drains=True)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and store.running():
        time.sleep(LOOK_S)
    _tell(store, as_json)
    if wait_s and store.running():
        raise typer.Exit(1)


@admin_app.command()
def requeue(request_id: RequestId, as_json: AsJson = False) -> None:
    """Put a job of any organisation back into the queue, to go on from its last checkpoint.

    FAILED and CANCELED ones as resume does, whatever the org's quota. One that runs saves and ends first, as in a drain; that
    counts as no fault.
    """
    from serve_app.store.jobs import Conflict, StaleAttempt

    _, store = opened()
    job = store.get(uuid_of(request_id, "a request_id"))
    if job is None:
        die(f"no job {request_id}")
    try:
        job = _requeued(store, job)
    except StaleAttempt:
        die(f"job {request_id} ended or went on at this moment, or is being canceled: look again")
    except Conflict as error:
        die(str(error))
    if as_json:
        show({"request_id": job.request_id, "org": job.org_id, "status": job.status, "attempt": job.attempt})
    elif job.yield_requested_at is not None:
        typer.echo(f"job {job.request_id} saves and goes back to the queue")
    else:
        typer.echo(f"job {job.request_id} is {job.status}")


def _requeued(store: JobStore, job: Job) -> Job:
    from serve_app.lifecycle import RESUMABLE, Status
    from serve_app.store.jobs import Conflict

    if job.status is Status.RUNNING:
        return store.ask_to_yield(job.request_id, job.attempt, OPERATOR, me())
    if job.status not in RESUMABLE:
        raise Conflict(f"job {job.request_id} is {job.status}: there is nothing to put back into the queue")
    return store.resume(job.request_id, by=me(), action="admin.requeue")
