"""The client for ordinary code."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
from tenacity import Retrying

from serve_app.client import api
from serve_app.client.answers import ApiError, parse, retrying
from serve_app.client.api import Answer, Call, Entry, Stream
from serve_app.client.downloads import LinkExpired, fetch, wanted
from serve_app.client.streams import TIMEOUT, EventStream

if TYPE_CHECKING:
    from serve_app.routes import answers

FINAL = frozenset({"COMPLETED", "FAILED", "CANCELED"})


class Client:
    """Talks to one service with one token. A context manager; safe to share between threads."""

    def __init__(self, url: str, token: str, *, timeout_s: float = 30) -> None:
        self._http = httpx.Client(**api.options(url, token, timeout_s))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> answers.Submitted:
        """POST /job/ as the documented form. Returns request_id, status, message. Raises ApiError.

        The same `idempotency_key` gives the same job again, also from another process; default a new one for each call.
        """
        return self._answer(api.submit(spec, idempotency_key=idempotency_key))

    def plan(self, spec: Mapping[str, Any]) -> answers.Plan:
        """What the job would take; creates nothing."""
        return self._answer(api.plan(spec))

    def get(self, request_id: str, org: str) -> answers.JobAnswer:
        """One job."""
        return self._answer(api.get(request_id, org))

    def list_jobs(
        self,
        org: str,
        *,
        status: str | None = None,
        experiment_name: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> answers.JobList:
        """One page of jobs, newest first: `{"jobs": [...], "next_cursor"}`."""
        return self._answer(api.list_jobs(org, status=status, experiment_name=experiment_name, limit=limit, cursor=cursor))

    def cancel(self, request_id: str, org: str) -> answers.JobAnswer:
        """Stop a job."""
        return self._answer(api.cancel(request_id, org))

    def resume(self, request_id: str, org: str) -> answers.JobAnswer:
        """Queue a FAILED or CANCELED job again; it goes on from its last checkpoint."""
        return self._answer(api.resume(request_id, org))

    def metrics(self, request_id: str, org: str, after_step: int | None = None) -> answers.Points:
        """Metric points: `{"points": [...]}`."""
        return self._answer(api.metrics(request_id, org, after_step))

    def events(self, request_id: str, org: str, after: int | None = None) -> answers.Events:
        """The event log, a page of it: `{"events": [...]}` with ids above `after`."""
        return self._answer(api.events(request_id, org, after))

    def logs(
        self, request_id: str, org: str, rank: int | None = None, tail: int | None = None, after: int | None = None
    ) -> answers.Logs:
        """The workers' log lines, the newest unless `after` is given: `{"logs": [...]}`."""
        return self._answer(api.logs(request_id, org, rank=rank, tail=tail, after=after))

    def follow_events(self, request_id: str, org: str, *, after: int | None = None) -> Iterator[answers.EventEntry]:
        """Each event as it comes, until the job has ended; a broken connection is taken up again."""
        return self._follow(api.follow_events(request_id, org, after=after))

    def follow_logs(
        self, request_id: str, org: str, *, rank: int | None = None, tail: int | None = None, after: int | None = None
    ) -> Iterator[answers.LogEntry]:
        """Each log line as it comes, until the job has ended; a broken connection is taken up again."""
        return self._follow(api.follow_logs(request_id, org, rank=rank, tail=tail, after=after))

    def artifacts(self, request_id: str, org: str) -> answers.Artifacts:
        """The job's files with links: `{"files": [...]}`."""
        return self._answer(api.artifacts(request_id, org))

    def create_secret(self, org: str, name: str, type_: str, data: Mapping[str, str]) -> answers.SecretAnswer:
        """Store a secret; returns its secret_id."""
        return self._answer(api.create_secret(org, name, type_, data))

    def list_secrets(self, org: str) -> answers.Secrets:
        """The org's secrets, without values."""
        return self._answer(api.list_secrets(org))

    def delete_secret(self, secret_id: str, org: str) -> answers.Deleted:
        """Delete a secret."""
        return self._answer(api.delete_secret(secret_id, org))

    def create_webhook(self, org: str, url: str, events: Sequence[str] | None = None) -> answers.NewWebhook:
        """Have an endpoint told when jobs of the org end; its secret is in this answer only. Default: every event."""
        return self._answer(api.create_webhook(org, url, events))

    def list_webhooks(self, org: str) -> answers.WebhookList:
        """The org's webhooks, without secrets."""
        return self._answer(api.list_webhooks(org))

    def test_webhook(self, webhook_id: str, org: str) -> answers.TestedWebhook:
        """Send the endpoint a test message; whether it took it."""
        return self._answer(api.test_webhook(webhook_id, org))

    def delete_webhook(self, webhook_id: str, org: str) -> answers.DeletedWebhook:
        """Delete a webhook, with what it was still to be told."""
        return self._answer(api.delete_webhook(webhook_id, org))

    def iter_jobs(
        self, org: str, *, status: str | None = None, experiment_name: str | None = None, page_size: int = 100
    ) -> Iterator[answers.JobAnswer]:
        """Every job, newest first, asked for page by page."""
        cursor = None
        while True:
            page = self.list_jobs(org, status=status, experiment_name=experiment_name, limit=page_size, cursor=cursor)
            yield from page["jobs"]
            if not (cursor := page["next_cursor"]):
                return

    def watch(self, request_id: str, org: str, poll_s: float = 1.0) -> Iterator[answers.JobAnswer]:
        """The job, again and again, until it is in a final state."""
        while True:
            job = self.get(request_id, org)
            yield job
            if job["status"] in FINAL:
                return
            time.sleep(poll_s)

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

    def _answer(self, call: Call[Answer]) -> Answer:
        for attempt in Retrying(**retrying(call.retry)):
            with attempt:
                return cast(Answer, parse(self._http.request(call.method, call.path, **call.parts)))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _follow(self, what: Stream[Entry]) -> Iterator[Entry]:
        stream, params = EventStream(), dict(what.params)
        while True:
            broken: Exception | None = None
            try:
                with self._http.stream("GET", what.path, params=params, headers=stream.headers(), timeout=TIMEOUT) as answer:
                    if not answer.is_success:
                        answer.read()
                    stream.opened(answer)
                    for block in answer.iter_bytes():
                        yield from cast(Iterator[Entry], stream.feed(block))
                        if stream.ended:
                            break
            except (httpx.TransportError, ApiError) as error:
                broken = error
            if stream.ended:
                return
            time.sleep(stream.wait_s(broken))
