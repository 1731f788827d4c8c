"""Python clients: `Client(url, token).submit(spec)`, and `AsyncClient` with the same calls awaited."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx
from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

FINAL = frozenset({"COMPLETED", "FAILED", "CANCELED"})
TRANSIENT = frozenset({429, 502, 503, 504})
PLAIN = ("org", "experiment_name")
LONGEST_WAIT_S = 30.0
PLAN_TIMEOUT_S = 60.0
RECONNECT_S = 1.0
STREAM = httpx.Timeout(30, read=60)  # a quiet stream sends a comment every 15 s
Answer = TypeVar("Answer")
_backoff_s = wait_exponential(multiplier=0.5, max=8)


class ApiError(Exception):
    """The service refused: HTTP status, its sentence, and the fields at fault."""

    def __init__(self, status: int, detail: str, errors: list[dict[str, Any]], retry_after_s: float | None = None) -> None:
        self.status, self.detail, self.errors, self.retry_after_s = status, detail, errors, retry_after_s
        lines = [f"  {e.get('field')}: {e.get('message')}" for e in errors]
        super().__init__("\n".join([f"{status}: {detail}", *(lines if len(lines) > 1 else [])]))


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, httpx.TransportError) or (isinstance(error, ApiError) and error.status in TRANSIENT)


def _wait_s(state: RetryCallState) -> float:
    """As long as the service's Retry-After asks, within reason; else exponential."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, ApiError) else None
    return _backoff_s(state) if asked is None else min(max(0.0, asked), LONGEST_WAIT_S)


def _checked_token(token: str) -> str:
    token = token.strip()
    # The HTTP library would refuse such a header too, in an error that quotes the token.
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token isn't a JWT: it holds blanks or other characters that no token has")
    return token


def _options(url: str, token: str, timeout_s: float) -> dict[str, Any]:
    """What both HTTP clients are made with. Proxies of the environment count, but not on the way to this machine itself."""
    here = urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")
    headers = {"Authorization": f"Bearer {_checked_token(token)}"}
    return {"base_url": url.rstrip("/"), "timeout": timeout_s, "headers": headers, "trust_env": not here}


def _retrying(retry: bool) -> dict[str, Any]:
    stop = stop_after_attempt(5 if retry else 1)
    return {"stop": stop, "wait": _wait_s, "retry": retry_if_exception(_is_transient), "reraise": True}


def _form(spec: Mapping[str, Any]) -> dict[str, tuple[None, str]]:
    """The documented multipart form: org and experiment_name as they are, the sections as JSON."""
    return {k: (None, v if k in PLAIN and isinstance(v, str) else json.dumps(v)) for k, v in spec.items()}


def _given(**parameters: Any) -> dict[str, Any]:
    return {k: v for k, v in parameters.items() if v is not None}


class _Api(Generic[Answer]):
    """The calls of the HTTP contract. Those that may safely be repeated are retried while the service is away."""

    def _call(self, method: str, path: str, *, retry: bool = True, **request: Any) -> Answer:
        raise NotImplementedError

    def submit(self, spec: Mapping[str, Any]) -> Answer:
        """POST /job/ as the documented form. Returns request_id, status, message. Raises ApiError."""
        return self._call("POST", "/job/", files=_form(spec), headers={"Idempotency-Key": str(uuid.uuid4())})

    def plan(self, spec: Mapping[str, Any]) -> Answer:
        """What the job would take; creates nothing."""
        return self._call("POST", "/job/plan/", files=_form(spec), timeout=PLAN_TIMEOUT_S)

    def get(self, request_id: str, org: str) -> Answer:
        """One job."""
        return self._call("GET", "/job/get/", params={"org_id": org, "request_id": request_id})

    def list_jobs(self, org: str, **filters: Any) -> Answer:
        """One page of jobs: `status`, `experiment_name`, `limit`, `cursor`."""
        return self._call("GET", "/job/list/", params=_given(org_id=org, **filters))

    def cancel(self, request_id: str, org: str) -> Answer:
        """Stop a job."""
        return self._call("POST", "/job/cancel/", json={"org_id": org, "request_id": request_id})

    def resume(self, request_id: str, org: str) -> Answer:
        """Queue a FAILED or CANCELED job again; it goes on from its last checkpoint."""
        return self._call("POST", "/job/resume/", json={"org_id": org, "request_id": request_id}, retry=False)

    def metrics(self, request_id: str, org: str, after_step: int | None = None) -> Answer:
        """Metric points: `{"points": [...]}`."""
        return self._call("GET", "/job/metrics/", params=_given(org_id=org, request_id=request_id, after_step=after_step))

    def events(self, request_id: str, org: str, after: int | None = None) -> Answer:
        """The event log: `{"events": [...]}`."""
        return self._call("GET", "/job/events/", params=_given(org_id=org, request_id=request_id, after=after))

    def logs(self, request_id: str, org: str, rank: int | None = None, tail: int | None = None) -> Answer:
        """The workers' log lines: `{"logs": [...]}`."""
        return self._call("GET", "/job/logs/", params=_given(org_id=org, request_id=request_id, rank=rank, tail=tail))

    def artifacts(self, request_id: str, org: str) -> Answer:
        """The job's files with links: `{"files": [...]}`."""
        return self._call("GET", "/job/artifacts/", params={"org_id": org, "request_id": request_id})

    def create_secret(self, org: str, name: str, type_: str, data: Mapping[str, str]) -> Answer:
        """Store a secret; returns its secret_id."""
        return self._call("POST", "/secret/", json={"org": org, "name": name, "type": type_, "data": dict(data)}, retry=False)

    def list_secrets(self, org: str) -> Answer:
        """The org's secrets, without values."""
        return self._call("GET", "/secret/list/", params={"org_id": org})

    def delete_secret(self, secret_id: str, org: str) -> Answer:
        """Delete a secret."""
        return self._call("DELETE", f"/secret/{secret_id}", params={"org_id": org}, retry=False)


class Client(_Api[dict[str, Any]]):
    """Talks to one service with one token. A context manager; safe to share between threads."""

    def __init__(self, url: str, token: str, *, timeout_s: float = 30) -> None:
        self._http = httpx.Client(**_options(url, token, timeout_s))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def watch(self, request_id: str, org: str, poll_s: float = 1.0) -> Iterator[dict[str, Any]]:
        """The job, again and again, until it is in a final state."""
        while True:
            job = self.get(request_id, org)
            yield job
            if job["status"] in FINAL:
                return
            time.sleep(poll_s)

    def follow(self, what: str, request_id: str, org: str, **filters: Any) -> Iterator[dict[str, Any]]:
        """Each entry of `events` or `logs` as it comes, until the job has ended; a broken connection is taken up again."""
        stream = EventStream()
        params = _given(org_id=org, request_id=request_id, **filters)
        while not stream.ended:
            try:
                with self._http.stream("GET", f"/job/{what}/", params=params, headers=stream.headers(), timeout=STREAM) as answer:
                    if not answer.is_success:
                        answer.read()
                        _parse(answer)
                    for line in answer.iter_lines():
                        yield from stream.feed(line)
                    stream.ended = stream.ended or answer.status_code == httpx.codes.NO_CONTENT
            except httpx.TransportError:
                pass  # asked again below, from the last id on
            if not stream.ended:
                time.sleep(RECONNECT_S)

    def download(self, request_id: str, org: str, folder: Path) -> list[Path]:
        """Fetch the job's files into `folder`; each is checked against its sha256 before it gets its name."""
        saved = []
        for file in self.artifacts(request_id, org)["files"]:
            target = _target(folder, file)
            with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".part-", delete=False) as part:
                try:
                    # Without our token: the link carries its own right, and the storage isn't the service.
                    with httpx.stream("GET", file["url"], timeout=60) as answer:
                        answer.raise_for_status()
                        sha256 = hashlib.sha256()
                        for block in answer.iter_bytes():
                            sha256.update(block)
                            part.write(block)
                    if file["sha256"] not in (None, sha256.hexdigest()):
                        raise ValueError(f"{file['name']} arrived damaged: its sha256 isn't the one of the manifest")
                    os.replace(part.name, target)
                finally:
                    Path(part.name).unlink(missing_ok=True)
            saved.append(target)
        return saved

    def _call(self, method: str, path: str, *, retry: bool = True, **request: Any) -> dict[str, Any]:
        for attempt in Retrying(**_retrying(retry)):
            with attempt:
                return _parse(self._http.request(method, path, **request))
        raise AssertionError("unreachable: the last attempt returns or raises")


class AsyncClient(_Api[Awaitable[dict[str, Any]]]):
    """The same calls, awaited. An async context manager."""

    def __init__(self, url: str, token: str, *, timeout_s: float = 30) -> None:
        self._http = httpx.AsyncClient(**_options(url, token, timeout_s))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def watch(self, request_id: str, org: str, poll_s: float = 1.0) -> AsyncIterator[dict[str, Any]]:
        """The job, again and again, until it is in a final state."""
        while True:
            job = await self.get(request_id, org)
            yield job
            if job["status"] in FINAL:
                return
            await asyncio.sleep(poll_s)

    async def follow(self, what: str, request_id: str, org: str, **filters: Any) -> AsyncIterator[dict[str, Any]]:
        """Each entry of `events` or `logs` as it comes, until the job has ended; a broken connection is taken up again."""
        stream = EventStream()
        params = _given(org_id=org, request_id=request_id, **filters)
        while not stream.ended:
            try:
                request: dict[str, Any] = {"params": params, "headers": stream.headers(), "timeout": STREAM}
                async with self._http.stream("GET", f"/job/{what}/", **request) as answer:
                    if not answer.is_success:
                        await answer.aread()
                        _parse(answer)
                    async for line in answer.aiter_lines():
                        for entry in stream.feed(line):
                            yield entry
                    stream.ended = stream.ended or answer.status_code == httpx.codes.NO_CONTENT
            except httpx.TransportError:
                pass  # asked again below, from the last id on
            if not stream.ended:
                await asyncio.sleep(RECONNECT_S)

    async def download(self, request_id: str, org: str, folder: Path) -> list[Path]:
        """Fetch the job's files into `folder`, as Client.download does, in a thread of its own."""
        url, headers = str(self._http.base_url), self._http.headers
        with Client(url, headers["Authorization"].removeprefix("Bearer ")) as client:
            return await asyncio.to_thread(client.download, request_id, org, folder)

    async def _call(self, method: str, path: str, *, retry: bool = True, **request: Any) -> dict[str, Any]:  # type: ignore[override]
        async for attempt in AsyncRetrying(**_retrying(retry)):
            with attempt:
                return _parse(await self._http.request(method, path, **request))
        raise AssertionError("unreachable: the last attempt returns or raises")


class EventStream:
    """Server-sent events line by line (WHATWG HTML, 9.2): entries out, the last id kept for a reconnect."""

    def __init__(self) -> None:
        self.ended = False
        self._last_id: str | None = None
        self._event: dict[str, str] = {}

    def headers(self) -> dict[str, str]:
        """What to ask with, the first time and again."""
        return {"Accept": "text/event-stream"} | ({"Last-Event-ID": self._last_id} if self._last_id else {})

    def feed(self, line: str) -> Iterator[dict[str, Any]]:
        """Take one line; an event's last line gives its entry."""
        name, _, value = line.partition(":")
        if line and name:
            self._event[name] = value.removeprefix(" ")
        if line or "data" not in self._event:
            return
        event, self._event = self._event, {}
        if event.get("event") == "end":
            self.ended = True
        else:
            self._last_id = event.get("id", self._last_id)
            yield json.loads(event["data"])


def _target(folder: Path, file: Mapping[str, Any]) -> Path:
    target = (folder / str(file["name"])).resolve()
    if not target.is_relative_to(folder.resolve()):
        raise ValueError(f"{file['name']} would be written outside of {folder}")
    if file["url"] is None:
        raise ValueError(f"the service keeps its files in a folder: {file['uri']}")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _parse(response: httpx.Response) -> dict[str, Any]:
    """The answer's JSON object. Raises ApiError."""
    try:
        body: Any = response.json()
    except ValueError:
        body = None
    # A proxy in between answers with pages of its own.
    if response.is_success and isinstance(body, dict):
        return body
    if response.is_success:
        raise ApiError(response.status_code, f"{response.url.host} didn't answer in JSON: is this Tuneyard's URL?", [])
    answer = body if isinstance(body, dict) else {}
    detail, errors = answer.get("detail"), answer.get("errors")
    raise ApiError(
        response.status_code,
        detail if isinstance(detail, str) else response.reason_phrase,
        [e for e in errors if isinstance(e, dict)] if isinstance(errors, list) else [],
        _seconds(response.headers.get("Retry-After")),
    )


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.isdecimal() else None
