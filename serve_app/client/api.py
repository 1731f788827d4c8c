"""The calls of the HTTP contract, written once for both clients, and what both connections are made with."""

from __future__ import annotations

import ipaddress
import json
import uuid
from collections.abc import Mapping
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlsplit

PLAIN = ("org", "experiment_name")
PLAN_TIMEOUT_S = 60.0
Answer = TypeVar("Answer")
Entries = TypeVar("Entries")


def is_loopback(url: str) -> bool:
    """Whether the URL is on this machine, where no proxy is wanted whatever the environment says."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def options(url: str, token: str, timeout_s: float) -> dict[str, Any]:
    """What both HTTP clients are made with. Raises ValueError for what can be no service's URL, or no token."""
    url, token = url.strip().rstrip("/"), token.strip()
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname or not url.isprintable():
        raise ValueError(f"{url!r} isn't the URL of a service: write it as https://host")
    # The HTTP library would refuse such a header too, in an error that quotes the token.
    if not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("the token isn't a JWT: it holds blanks or other characters that no token has")
    headers = {"Authorization": f"Bearer {token}"}
    return {"base_url": url, "timeout": timeout_s, "headers": headers, "trust_env": not is_loopback(url)}


def given(**parameters: Any) -> dict[str, Any]:
    """The parameters that aren't None."""
    return {k: v for k, v in parameters.items() if v is not None}


def _form(spec: Mapping[str, Any]) -> dict[str, tuple[None, str]]:
    """The documented multipart form: org and experiment_name as they are, the sections as JSON."""
    return {k: (None, v if k in PLAIN and isinstance(v, str) else json.dumps(v)) for k, v in spec.items()}


class Api(Generic[Answer, Entries]):
    """The calls. Those that may safely be repeated are retried while the service is away."""

    def _call(self, method: str, path: str, *, retry: bool = True, **request: Any) -> Answer:
        raise NotImplementedError

    def follow(self, what: str, request_id: str, org: str, **filters: Any) -> Entries:
        """Each entry of `events` or `logs` as it comes, until the job has ended; a broken connection is taken up again."""
        raise NotImplementedError

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> Answer:
        """POST /job/ as the documented form. Returns request_id, status, message. Raises ApiError.

        The same `idempotency_key` gives the same job again, also from another process; default a new one for each call.
        """
        return self._call("POST", "/job/", files=_form(spec), headers={"Idempotency-Key": idempotency_key or str(uuid.uuid4())})

    def plan(self, spec: Mapping[str, Any]) -> Answer:
        """What the job would take; creates nothing."""
        return self._call("POST", "/job/plan/", files=_form(spec), timeout=PLAN_TIMEOUT_S)

    def get(self, request_id: str, org: str) -> Answer:
        """One job."""
        return self._call("GET", "/job/get/", params={"org_id": org, "request_id": request_id})

    def list_jobs(
        self,
        org: str,
        *,
        status: str | None = None,
        experiment_name: str | None = None,
        limit: int | None = None,
        cursor: str | None = None,
    ) -> Answer:
        """One page of jobs, newest first: `{"jobs": [...], "next_cursor"}`."""
        filters = given(status=status, experiment_name=experiment_name, limit=limit, cursor=cursor)
        return self._call("GET", "/job/list/", params={"org_id": org} | filters)

    def cancel(self, request_id: str, org: str) -> Answer:
        """Stop a job."""
        return self._call("POST", "/job/cancel/", json={"org_id": org, "request_id": request_id})

    def resume(self, request_id: str, org: str) -> Answer:
        """Queue a FAILED or CANCELED job again; it goes on from its last checkpoint."""
        return self._call("POST", "/job/resume/", json={"org_id": org, "request_id": request_id}, retry=False)

    def metrics(self, request_id: str, org: str, after_step: int | None = None) -> Answer:
        """Metric points: `{"points": [...]}`."""
        return self._call("GET", "/job/metrics/", params=given(org_id=org, request_id=request_id, after_step=after_step))

    def events(self, request_id: str, org: str, after: int | None = None) -> Answer:
        """The event log, a page of it: `{"events": [...]}` with ids above `after`."""
        return self._call("GET", "/job/events/", params=given(org_id=org, request_id=request_id, after=after))

    def logs(
        self, request_id: str, org: str, rank: int | None = None, tail: int | None = None, after: int | None = None
    ) -> Answer:
        """The workers' log lines, the newest unless `after` is given: `{"logs": [...]}`."""
        params = given(org_id=org, request_id=request_id, rank=rank, tail=tail, after=after)
        return self._call("GET", "/job/logs/", params=params)

    def follow_events(self, request_id: str, org: str, *, after: int | None = None) -> Entries:
        """Each event as it comes, until the job has ended."""
        return self.follow("events", request_id, org, after=after)

    def follow_logs(
        self, request_id: str, org: str, *, rank: int | None = None, tail: int | None = None, after: int | None = None
    ) -> Entries:
        """Each log line as it comes, until the job has ended."""
        return self.follow("logs", request_id, org, rank=rank, tail=tail, after=after)

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
        return self._call("DELETE", f"/secret/{quote(secret_id, safe='')}", params={"org_id": org}, retry=False)
