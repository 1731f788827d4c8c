"""The same client for asyncio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import httpx
from tenacity import AsyncRetrying

from serve_app.client.answers import ApiError, parse, retrying
from serve_app.client.api import Api, given, options
from serve_app.client.blocking import FINAL
from serve_app.client.downloads import LinkExpired, fetch, wanted
from serve_app.client.streams import TIMEOUT, EventStream


class AsyncClient(Api[Awaitable[dict[str, Any]], AsyncIterator[dict[str, Any]]]):
    """Client's calls, awaited. An async context manager."""

    def __init__(self, url: str, token: str, *, timeout_s: float = 30) -> None:
        self._http = httpx.AsyncClient(**options(url, token, timeout_s))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def iter_jobs(
        self, org: str, *, status: str | None = None, experiment_name: str | None = None, page_size: int = 100
    ) -> AsyncIterator[dict[str, Any]]:
        """Every job, newest first, asked for page by page."""
        cursor = None
        while True:
            page = await self.list_jobs(org, status=status, experiment_name=experiment_name, limit=page_size, cursor=cursor)
            for job in page["jobs"]:
                yield job
            if not (cursor := page["next_cursor"]):
                return

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
        stream, params = EventStream(), given(org_id=org, request_id=request_id, **filters)
        while True:
            broken: Exception | None = None
            try:
                request: dict[str, Any] = {"params": params, "headers": stream.headers(), "timeout": TIMEOUT}
                async with self._http.stream("GET", f"/job/{what}/", **request) as answer:
                    if not answer.is_success:
                        await answer.aread()
                    stream.opened(answer)
                    async for block in answer.aiter_bytes():
                        for entry in stream.feed(block):
                            yield entry
                        if stream.ended:
                            break
            except (httpx.TransportError, ApiError) as error:
                broken = error
            if stream.ended:
                return
            await asyncio.sleep(stream.wait_s(broken))

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

    async def _call(self, method: str, path: str, *, retry: bool = True, **request: Any) -> dict[str, Any]:  # type: ignore[override]
        async for attempt in AsyncRetrying(**retrying(retry)):
            with attempt:
                return parse(await self._http.request(method, path, **request))
        raise AssertionError("unreachable: the last attempt returns or raises")
