"""The client for ordinary code."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from tenacity import Retrying

from serve_app.client.answers import ApiError, parse, retrying
from serve_app.client.api import Api, given, options
from serve_app.client.downloads import LinkExpired, fetch, wanted
from serve_app.client.streams import TIMEOUT, EventStream

FINAL = frozenset({"COMPLETED", "FAILED", "CANCELED"})


class Client(Api[dict[str, Any], Iterator[dict[str, Any]]]):
    """Talks to one service with one token. A context manager; safe to share between threads."""

    def __init__(self, url: str, token: str, *, timeout_s: float = 30) -> None:
        self._http = httpx.Client(**options(url, token, timeout_s))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def iter_jobs(
        self, org: str, *, status: str | None = None, experiment_name: str | None = None, page_size: int = 100
    ) -> Iterator[dict[str, Any]]:
        """Every job, newest first, asked for page by page."""
        cursor = None
        while True:
            page = self.list_jobs(org, status=status, experiment_name=experiment_name, limit=page_size, cursor=cursor)
            yield from page["jobs"]
            if not (cursor := page["next_cursor"]):
                return

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
        stream, params = EventStream(), given(org_id=org, request_id=request_id, **filters)
        while True:
            broken: Exception | None = None
            try:
                with self._http.stream(
                    "GET", f"/job/{what}/", params=params, headers=stream.headers(), timeout=TIMEOUT
                ) as answer:
                    if not answer.is_success:
                        answer.read()
                    stream.opened(answer)
                    for block in answer.iter_bytes():
                        yield from stream.feed(block)
                        if stream.ended:
                            break
            except (httpx.TransportError, ApiError) as error:
                broken = error
            if stream.ended:
                return
            time.sleep(stream.wait_s(broken))

    def download(self, request_id: str, org: str, folder: str | os.PathLike[str]) -> list[Path]:
        """Fetch the job's files into `folder`; each is checked against its sha256 before it gets its name.

        Raises DownloadError.
        """
        into = Path(folder)
        files = wanted(self.artifacts(request_id, org), into)
        for name, file in files.items():
            try:
                fetch(file)
            except LinkExpired:  # links work for minutes, and the files before this one may have taken longer
                again = wanted(self.artifacts(request_id, org), into)
                if name not in again:
                    raise
                fetch(again[name])
        return [file.target for file in files.values()]

    def _call(self, method: str, path: str, *, retry: bool = True, **request: Any) -> dict[str, Any]:
        for attempt in Retrying(**retrying(retry)):
            with attempt:
                return parse(self._http.request(method, path, **request))
        raise AssertionError("unreachable: the last attempt returns or raises")
