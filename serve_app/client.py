"""A Python client: `Client(url, token).submit(spec)`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_exponential

FINAL = frozenset({"COMPLETED", "FAILED", "CANCELED"})
TRANSIENT = frozenset({429, 502, 503, 504})
PLAIN = ("org", "experiment_name")
LONGEST_WAIT_S = 30.0
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


class Client:
    """Talks to one service with one token. Calls that may safely be repeated are retried while the service is away."""

    def __init__(self, url: str, token: str, *, timeout_s: float = 30) -> None:
        token = token.strip()
        # The HTTP library would refuse such a header too, in an error that quotes the token.
        if not token.isascii() or not token.isprintable() or " " in token:
            raise ValueError("the token isn't a JWT: it holds blanks or other characters that no token has")
        self._http = httpx.Client(
            base_url=url.rstrip("/"), timeout=timeout_s, headers={"Authorization": f"Bearer {token}"}, trust_env=False
        )

    def submit(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """POST /job/ as the documented form. Returns request_id, status, message. Raises ApiError."""
        form = {k: v if k in PLAIN and isinstance(v, str) else json.dumps(v) for k, v in spec.items()}
        parts = {name: (None, value) for name, value in form.items()}
        return self._call("POST", "/job/", files=parts, headers={"Idempotency-Key": str(uuid.uuid4())})

    def get(self, request_id: str, org: str) -> dict[str, Any]:
        """One job."""
        return self._call("GET", "/job/get/", params={"org_id": org, "request_id": request_id})

    def list_jobs(self, org: str, **filters: Any) -> dict[str, Any]:
        """One page of jobs: `status`, `experiment_name`, `limit`, `cursor`."""
        return self._call("GET", "/job/list/", params={"org_id": org} | {k: v for k, v in filters.items() if v is not None})

    def cancel(self, request_id: str, org: str) -> dict[str, Any]:
        """Stop a job."""
        return self._call("POST", "/job/cancel/", json={"org_id": org, "request_id": request_id})

    def watch(self, request_id: str, org: str, poll_s: float = 1.0) -> Iterator[dict[str, Any]]:
        """The job, again and again, until it is in a final state."""
        while True:
            job = self.get(request_id, org)
            yield job
            if job["status"] in FINAL:
                return
            time.sleep(poll_s)

    def create_secret(self, org: str, name: str, type_: str, data: Mapping[str, str]) -> dict[str, Any]:
        """Store a secret; returns its secret_id."""
        return self._call("POST", "/secret/", json={"org": org, "name": name, "type": type_, "data": dict(data)}, retry=False)

    def list_secrets(self, org: str) -> dict[str, Any]:
        """The org's secrets, without values."""
        return self._call("GET", "/secret/list/", params={"org_id": org})

    def _call(self, method: str, path: str, *, retry: bool = True, **request: Any) -> dict[str, Any]:
        attempts = Retrying(
            stop=stop_after_attempt(5 if retry else 1),
            wait=_wait_s,
            retry=retry_if_exception(_is_transient),
            reraise=True,
        )
        for attempt in attempts:
            with attempt:
                return self._once(method, path, request)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _once(self, method: str, path: str, request: dict[str, Any]) -> dict[str, Any]:
        response = self._http.request(method, path, **request)
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
