"""What a job tells while it runs and leaves behind: events, metrics, logs, artifacts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from serve_app.errors import ApiError
from serve_app.lifecycle import FINAL
from serve_app.routes import examples
from serve_app.routes.answers import Artifacts, Events, Logs, Points, documented, reply
from serve_app.routes.service import MAX_ID, MAX_STEP, Asking, Here, OfOrg, Service, find_job
from serve_app.storage import artifacts
from serve_app.store.jobs import Job
from serve_app.store.tables import wire_time

router = APIRouter(tags=["jobs"])
FOLLOW_POLL_S = 1.0
HEARTBEAT_S = 15.0
MAX_PAGE = 10_000
LOGGED_CHARS = 300
SSE = "text/event-stream"
log = structlog.get_logger()


def readable_job(asking: Asking, here: Here, request_id: str, org_id: str) -> Job:
    """The job a query names. Raises 403, 404, 422."""
    asking.require_scope("jobs:read")
    return find_job(here, asking, request_id, org_id)


def readable_job_by_path(asking: Asking, here: Here, request_id: str, org_id: OfOrg = None) -> Job:
    """The job a path names. Raises 403, 404, 422."""
    asking.require_scope("jobs:read")
    return find_job(here, asking, request_id, org_id)


ByQuery = Annotated[Job, Depends(readable_job)]
ByPath = Annotated[Job, Depends(readable_job_by_path)]
After = Annotated[int, Query(ge=0, le=MAX_ID, description="Only what has a larger id.")]
AfterStep = Annotated[int, Query(ge=-1, le=MAX_STEP, description="Only points of later steps; 0 is before training.")]
Rank = Annotated[int | None, Query(ge=0, le=100_000, description="Only this worker's lines.")]
Tail = Annotated[int | None, Query(ge=1, le=MAX_PAGE, description="The last lines, in order; default 1000.")]
LastEventId = Annotated[str | None, Header(description="Where a broken stream goes on (sent by EventSource itself).")]
STREAM = {SSE: {"schema": {"type": "string"}}}
ENDED: dict[int | str, dict[str, Any]] = {
    204: {"description": "To a reconnecting stream: the job has ended and everything was sent."},
}

Fetch = Callable[[int], list[dict[str, Any]]]


class Followed(StreamingResponse):
    """A stream that has one of its org's places for as long as it lasts. Raises 429 or 503 before it begins."""

    def __init__(self, place: AbstractContextManager[None], entries: AsyncIterator[str]) -> None:
        super().__init__(entries, media_type=SSE, headers={"Cache-Control": "no-store"})
        self._place = place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._place:
            await super().__call__(scope, receive, send)


async def _answer(
    request: Request, here: Service, job: Job, name: str, first: Fetch, more: Fetch, after: int, last_event_id: str | None
) -> Response:
    """One page as JSON, or a stream of server-sent events when the client accepts that.

    A stream begins with what `first` gives and goes on with `more`.
    """
    if SSE not in request.headers.get("accept", ""):
        return reply({name: await run_in_threadpool(first, after)})
    if last_event_id is not None and last_event_id.isdecimal() and len(last_event_id) < 19:
        after, first = int(last_event_id), more
        if job.status in FINAL and not await run_in_threadpool(more, after):
            return Response(status_code=204)  # which ends EventSource's reconnecting
    return Followed(here.streams.hold(job.org_id), _stream(here, job, name, first, more, after))


async def _stream(here: Service, job: Job, name: str, first: Fetch, more: Fetch, after: int) -> AsyncIterator[str]:
    yield "retry: 2000\n\n"
    sent_at, fetch = time.monotonic(), first
    while True:
        # The status first: what is written before a job ends is then never missed.
        now = await run_in_threadpool(here.store.get, job.request_id)
        entries = await run_in_threadpool(fetch, after)
        fetch = more
        for entry in entries:
            yield f"id: {entry['id']}\nevent: {name}\ndata: {json.dumps(entry, ensure_ascii=False)}\n\n"
            after, sent_at = entry["id"], time.monotonic()
        if entries:
            continue
        if now is None or now.status in FINAL:
            yield f"event: end\ndata: {json.dumps({'status': str(now.status) if now else None})}\n\n"
            return
        if time.monotonic() - sent_at > HEARTBEAT_S:
            yield ": still here\n\n"  # or proxies close what they think is idle
            sent_at = time.monotonic()
        await asyncio.sleep(FOLLOW_POLL_S)


@router.get(
    "/job/events/", responses=documented(Events, "The page, or the stream.", examples.EVENTS, refused=[404], **STREAM) | ENDED
)
@router.get("/job/events", include_in_schema=False)
async def events(request: Request, here: Here, job: ByQuery, after: After = 0, last_event_id: LastEventId = None) -> Response:
    """The job's event log, oldest first; `Accept: text/event-stream` follows it."""

    def fetch(after: int) -> list[dict[str, Any]]:
        found = here.store.journal.events(job.request_id, after)
        return [{"id": e.id, "time": wire_time(e.time), "kind": e.kind, "message": e.message} for e in found]

    return await _answer(request, here, job, "events", fetch, fetch, after, last_event_id)


@router.get("/job/logs/", responses=documented(Logs, "The lines, or the stream.", examples.LOGS, refused=[404], **STREAM) | ENDED)
@router.get("/job/logs", include_in_schema=False)
async def logs(
    request: Request,
    here: Here,
    job: ByQuery,
    rank: Rank = None,
    tail: Tail = None,
    after: After = 0,
    last_event_id: LastEventId = None,
) -> Response:
    """What the job's workers logged and printed, without secrets; `Accept: text/event-stream` follows it.

    Without `after` the newest lines are given.
    """
    newest = tail if tail is not None or after else 1000

    def fetch(after: int, tail: int | None = None) -> list[dict[str, Any]]:
        found = here.store.journal.log(job.request_id, rank=rank, after=after, tail=tail)
        return [{"id": e.id, "time": wire_time(e.time), "attempt": e.attempt, "rank": e.rank, "line": e.line} for e in found]

    return await _answer(request, here, job, "logs", partial(fetch, tail=newest), fetch, after, last_event_id)


@router.get("/job/metrics/", responses=documented(Points, "The points.", examples.POINTS, refused=[404]))
@router.get("/job/metrics", include_in_schema=False)
def metrics(here: Here, job: ByQuery, after_step: AfterStep = -1) -> Response:
    """The job's metric points in order of steps."""
    return reply({"points": here.store.journal.points(job.request_id, after_step)})


@router.get("/job/artifacts/", responses=documented(Artifacts, "The files.", examples.ARTIFACTS, refused=[404]))
@router.get("/job/artifacts", include_in_schema=False)
def list_artifacts(here: Here, job: ByQuery) -> Response:
    """The job's files, each with a link that works for 15 minutes; the adapter's appear once the job is COMPLETED."""
    try:
        return reply({"files": artifacts(here.settings, job.org_id, job.request_id)})
    except OSError as error:
        log.warning("the object storage can't be listed", error=str(error)[:LOGGED_CHARS])
        raise ApiError(503, "the object storage can't be reached; try again shortly", headers={"Retry-After": "5"}) from None


@router.get("/job/{request_id}/events", include_in_schema=False)
@router.get("/job/{request_id}/events/", include_in_schema=False)
async def events_by_path(
    request: Request, here: Here, job: ByPath, after: After = 0, last_event_id: LastEventId = None
) -> Response:
    return await events(request, here, job, after, last_event_id)


@router.get("/job/{request_id}/logs", include_in_schema=False)
@router.get("/job/{request_id}/logs/", include_in_schema=False)
async def logs_by_path(
    request: Request,
    here: Here,
    job: ByPath,
    rank: Rank = None,
    tail: Tail = None,
    after: After = 0,
    last_event_id: LastEventId = None,
) -> Response:
    return await logs(request, here, job, rank, tail, after, last_event_id)


@router.get("/job/{request_id}/metrics", include_in_schema=False)
@router.get("/job/{request_id}/metrics/", include_in_schema=False)
def metrics_by_path(here: Here, job: ByPath, after_step: AfterStep = -1) -> Response:
    return metrics(here, job, after_step)


@router.get("/job/{request_id}/artifacts", include_in_schema=False)
@router.get("/job/{request_id}/artifacts/", include_in_schema=False)
def artifacts_by_path(here: Here, job: ByPath) -> Response:
    return list_artifacts(here, job)
