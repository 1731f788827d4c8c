"""What stands before Serve's proxy, in its process: ids of requests, the limit of bodies, and problems where the proxy has only
its own words."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn import config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve_app import metrics
from serve_app.access import NO_ROUTE, RequestId, method_of
from serve_app.body import declares_more, too_long
from serve_app.errors import RETRY_AFTER_S, ApiError, problem, to_api_error
from serve_app.settings import Settings

CALLBACK = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.proxy.for_proxy"}  # where Ray is started
ROUTES = "/-/routes"  # of Serve's own, beside /-/healthz, which says nothing but that it is there
LINGER_S = 2.0


def for_proxy() -> list[Middleware]:
    """What Serve puts before its proxy, in whose process it calls this before it listens; the last one comes first."""
    config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{Protocol.__name__}"  # Serve lets nobody choose another one
    return [Middleware(Problems), Middleware(BodyLimit, limit_bytes=Settings.load().max_body_bytes), Middleware(RequestId)]


class Protocol(HttpToolsProtocol):
    """Answers a problem to what isn't HTTP, of which uvicorn tells nobody behind it."""

    def send_400_response(self, msg: str) -> None:
        """Say so, and close the connection. `msg` is how uvicorn says it."""
        answer = problem(ApiError(400, "this isn't HTTP/1.1: the first line, a header or a length of the body is malformed"))
        headers = [b"%s: %s" % header for header in [*answer.raw_headers, (b"connection", b"close")]]
        self.transport.write(b"\r\n".join([b"HTTP/1.1 400 Bad Request", *headers, b"", bytes(answer.body)]))
        self.transport.close()


class BodyLimit:
    """Answers 413 to a request of any path whose body is longer: at once when that is declared, else as soon as it is.

    The proxy would hold all that a client sends until a replica takes it or answers. What is behind this sees such a body end as
    if the client had hung up.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app, self._limit_bytes = app, limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if declares_more(Headers(scope=scope), self._limit_bytes):
            await self._refuse(receive, send)
            return
        taken_bytes, started = 0, False

        async def counted() -> Message:
            nonlocal taken_bytes
            if taken_bytes <= self._limit_bytes:
                message = await receive()
                taken_bytes += len(message.get("body", b""))
                if taken_bytes <= self._limit_bytes:
                    return message
            return {"type": "http.disconnect"}

        async def watched(message: Message) -> None:
            nonlocal started
            if started or taken_bytes <= self._limit_bytes:
                started = True
                await send(message)

        await self._app(scope, counted, watched)
        if taken_bytes > self._limit_bytes and not started:
            await self._refuse(receive, send)

    async def _refuse(self, receive: Receive, send: Send) -> None:
        answer = problem(too_long(self._limit_bytes))
        headers = [*answer.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": answer.body, "more_body": True})
        # Closed while bytes still come in, a connection is reset, and the client may lose the answer before it has read it.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b""})


class Problems:
    """Answers 503 in place of the proxy, which has plain text or nothing to say when a replica dies or none is there yet, and 404
    where it would tell anybody what else runs on this Serve.

    The service itself answers nothing in plain text.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"] == ROUTES:
            await problem(to_api_error(HTTPException(404)))(scope, receive, send)
            return
        started = dropped = False

        async def watched(message: Message) -> None:
            nonlocal started, dropped
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
                dropped = message["status"] >= 400 and kind.startswith("text/plain")
            if not dropped:
                started = True
                await send(message)

        began = time.perf_counter()
        await self._app(scope, receive, watched)
        if not started:
            metrics.HTTP_TIME.record(time.perf_counter() - began, route=NO_ROUTE, method=method_of(scope), status="5xx")
            detail = "the service can't answer just now, as when a part of it starts again; try again shortly"
            await problem(ApiError(503, detail, headers={"Retry-After": RETRY_AFTER_S}))(scope, receive, send)
