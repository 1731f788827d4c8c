"""What is around every HTTP request: its id, its line in the log, its time in the metrics."""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import metrics, traces

log = structlog.get_logger()
HEADER = "x-request-id"
SANE = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)
PROBES = ("/healthz", "/readyz")
NO_ROUTE = "none"  # of a path that there isn't, and of a request that no replica has answered
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_job: ContextVar[dict[str, str]] = ContextVar("job")


def concerns(request_id: str) -> None:
    """Say which job the request under way is about: all that is logged for it from now on tells that. From any thread of it."""
    structlog.contextvars.bind_contextvars(request_id=request_id)
    traces.concerns(request_id)
    _job.get({})["request_id"] = request_id  # a handler's thread has a copy of the context, in which this is the same one


def request_id_of(scope: Scope) -> str:
    """The caller's X-Request-Id where it is one, else a new one."""
    given = Headers(scope=scope).get(HEADER, "")
    return given if SANE.fullmatch(given) else uuid.uuid4().hex


class RequestId:
    """Has every request bear an id that may stand in a log, and every answer tell it, once.

    In Serve's proxy: Serve itself would take and return whatever the caller sends.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        http_request_id = request_id_of(scope)
        MutableHeaders(scope=scope)[HEADER] = http_request_id

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = http_request_id
            await send(message)

        await self._app(scope, receive, telling)


class Access:
    """Binds `http_request_id` to all that is logged for a request, writes its line when it is answered, and takes its time."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(http_request_id=request_id_of(scope))
        job = dict[str, str]()
        _job.set(job)
        began, status = time.perf_counter(), None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._answered(scope, status, time.perf_counter() - began, job)
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            if status is None:  # it is answered further out
                self._answered(scope, 500, time.perf_counter() - began, job)
            raise

    def _answered(self, scope: Scope, status: int, took_s: float, job: dict[str, str]) -> None:
        route, method = _route(scope), method_of(scope)
        metrics.HTTP_TIME.record(took_s, route=route, method=method, status=f"{status // 100}xx")
        if route not in PROBES:
            log.info("request", method=method, path=scope["path"], status=status, took_s=round(took_s, 4), **job)


def method_of(scope: Scope) -> str:
    """The request's method, `other` for one that nobody knows."""
    return scope["method"] if scope["method"] in METHODS else "other"


def _route(scope: Scope) -> str:
    """The path as it is declared, the same with and without its trailing slash."""
    path: str = getattr(scope.get("route"), "path", NO_ROUTE)
    return path.rstrip("/") or path
