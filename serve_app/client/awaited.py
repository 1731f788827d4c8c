"""The same client for asyncio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
from tenacity import AsyncRetrying

from serve_app.client import api
from serve_app.client.answers import ApiError, parse, retrying
from serve_app.client.api import Answer, Call, Entry, Stream
from serve_app.client.blocking import FINAL
from serve_app.client.downloads import LinkExpired, fetch, wanted
from serve_app.client.streams import TIMEOUT, EventStream

if TYPE_CHECKING:
    from serve_app.routes import answers


class AsyncClient:
    """Client's calls, awaited. An async context manager."""

    def __init__(self, url: str, token: str, *, timeout_s: float = 30) -> None:
        self._http = httpx.AsyncClient(**api.options(url, token, timeout_s))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> answers.Submitted:
        """POST /job/ as the documented form. Returns request_id, status, message. Raises ApiError.

        The same `idempotency_key` gives the same job again, also from another process; default a new one for each call.
        """
        return await self._answer(api.submit(spec, idempotency_key=idempotency_key))

    async def plan(self, spec: Mapping[str, Any]) -> answers.Plan:
        """What the job would take; creates nothing."""
        return await self._answer(api.plan(spec))

    async def get(self, request_id: str, org: str) -> answers.JobAnswer:
        """One job."""
        return await self._answer(api.get(request_id, org))

    async def list_jobs(
        self,
        org: str,
        *,
        status: str | None = None,
        experiment_name: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> answers.JobList:
        """One page of jobs, newest first: `{"jobs": [...], "next_cursor"}`."""
        return await self._answer(api.list_jobs(org, status=status, experiment_name=experiment_name, limit=limit, cursor=cursor))

    async def cancel(self, request_id: str, org: str) -> answers.JobAnswer:
        """Stop a job."""
        return await self._answer(api.cancel(request_id, org))

    async def resume(self, request_id: str, org: str) -> answers.JobAnswer:
        """Queue a FAILED or CANCELED job again; it goes on from its last checkpoint."""
        return await self._answer(api.resume(request_id, org))

    async def metrics(self, request_id: str, org: str, after_step: int | None = None) -> answers.Points:
        """Metric points: `{"points": [...]}`."""
        return await self._answer(api.metrics(request_id, org, after_step))

    async def events(self, request_id: str, org: str, after: int | None = None) -> answers.Events:
        """The event log, a page of it: `{"events": [...]}` with ids above `after`."""
        return await self._answer(api.events(request_id, org, after))

    async def logs(
        self, request_id: str, org: str, rank: int | None = None, tail: int | None = None, after: int | None = None
    ) -> answers.Logs:
        """The workers' log lines, the newest unless `after` is given: `{"logs": [...]}`."""
        return await self._answer(api.logs(request_id, org, rank=rank, tail=tail, after=after))

    def follow_events(self, request_id: str, org: str, *, after: int | None = None) -> AsyncIterator[answers.EventEntry]:
        """Each event as it comes, until the job has ended; a broken connection is taken up again."""
        return self._follow(api.follow_events(request_id, org, after=after))

    def follow_logs(
        self, request_id: str, org: str, *, rank: int | None = None, tail: int | None = None, after: int | None = None
    ) -> AsyncIterator[answers.LogEntry]:
        """Each log line as it comes, until the job has ended; a broken connection is taken up again."""
        return self._follow(api.follow_logs(request_id, org, rank=rank, tail=tail, after=after))

    async def artifacts(self, request_id: str, org: str) -> answers.Artifacts:
        """The job's files with links: `{"files": [...]}`."""
        return await self._answer(api.artifacts(request_id, org))

    async def create_secret(self, org: str, name: str, type_: str, data: Mapping[str, str]) -> answers.SecretAnswer:
        """Store a secret; returns its secret_id."""
        return await self._answer(api.create_secret(org, name, type_, data))

    async def list_secrets(self, org: str) -> answers.Secrets:
        """The org's secrets, without values."""
        return await self._answer(api.list_secrets(org))

    async def delete_secret(self, secret_id: str, org: str) -> answers.Deleted:
        """Delete a secret."""
        return await self._answer(api.delete_secret(secret_id, org))

    async def create_webhook(self, org: str, url: str, events: Sequence[str] | None = None) -> answers.NewWebhook:
        """Have an endpoint told when jobs of the org end; its secret is in this answer only. Default: every event."""
        return await self._answer(api.create_webhook(org, url, events))

    async def list_webhooks(self, org: str) -> answers.WebhookList:
        """The org's webhooks, without secrets."""
        return await self._answer(api.list_webhooks(org))

    async def test_webhook(self, webhook_id: str, org: str) -> answers.TestedWebhook:
        """Send the endpoint a test message; whether it took it."""
        return await self._answer(api.test_webhook(webhook_id, org))

    async def delete_webhook(self, webhook_id: str, org: str) -> answers.DeletedWebhook:
        """Delete a webhook, with what it was still to be told."""
        return await self._answer(api.delete_webhook(webhook_id, org))

    async def iter_jobs(
        self, org: str, *, status: str | None = None, experiment_name: str | None = None, page_size: int = 100
    ) -> AsyncIterator[answers.JobAnswer]:
        """Every job, newest first, asked for page by page."""
        cursor = None
        while True:
            page = await self.list_jobs(org, status=status, experiment_name=experiment_name, limit=page_size, cursor=cursor)
            for job in page["jobs"]:
                yield job
            if not (cursor := page["next_cursor"]):
                return

    async def watch(self, request_id: str, org: str, poll_s: float = 1.0) -> AsyncIterator[answers.JobAnswer]:
        """The job, again and again, until it is in a final state."""
        while True:
            job = await self.get(request_id, org)
            yield job
            if job["status"] in FINAL:
                return
            await asyncio.sleep(poll_s)

    async def download(self, request_id: str, org: str, folder: str | os.PathLike[str]) -> list[Path]:
        """Fetch the job's files into `folder`, as Client.download does; each in a thread, for the disk would block the loop."""
        into = Path(folder)
        files = wanted(await self.artifacts(request_id, org), into)
        for name, file in files.items():
            try:
                await asyncio.to_thread(fetch, file)
            except LinkExpired:
                again = wanted(await self.artifacts(request_id, org), into)
                if name not in again:
                    raise
                await asyncio.to_thread(fetch, again[name])
        return [file.target for file in files.values()]

    async def _answer(self, call: Call[Answer]) -> Answer:
        async for attempt in AsyncRetrying(**retrying(call.retry)):
            with attempt:
                return cast(Answer, parse(await self._http.request(call.method, call.path, **call.parts)))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def _follow(self, what: Stream[Entry]) -> AsyncIterator[Entry]:
        stream, params = EventStream(), dict(what.params)
        while True:
            broken: Exception | None = None
            try:
                request: dict[str, Any] = {"params": params, "headers": stream.headers(), "timeout": TIMEOUT}
                async with self._http.stream("GET", what.path, **request) as answer:
                    if not answer.is_success:
                        await answer.aread()
                    stream.opened(answer)
                    async for block in answer.aiter_bytes():
                        for entry in cast(Iterator[Entry], stream.feed(block)):
                            yield entry
                        if stream.ended:
                            break
            except (httpx.TransportError, ApiError) as error:
                broken = error
            if stream.ended:
                return
            await asyncio.sleep(stream.wait_s(broken))
