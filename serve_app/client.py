"""A Python client: `Client(url, token).submit(spec)`."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

FINAL = frozenset({"COMPLETED", "FAILED", "CANCELED"})
TRANSIENT = frozenset({429, 502, 503, 504})
PLAIN = ("org", "experiment_name")


class ApiError(Exception):
    """The service refused: HTTP status, its sentence, and the fields at fault."""

    def __init__(self, status: int, detail: str, errors: list[dict[str, Any]]) -> None:
        self.status, self.detail, self.errors = status, detail, errors
        lines = [f"  {e.get('field')}: {e.get('message')}" for e in errors]
        super().__init__("\n".join([f"{status}: {detail}", *(lines if len(lines) > 1 else [])]))


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, httpx.TransportError) or (isinstance(error, ApiError) and error.status in TRANSIENT)


class Client:
    """Talks to one service with one token. Calls that may safely be repeated are retried while the service is away."""

    def __init__(self, url: str, token: str, *, timeout_s: float = 30) -> None:
        self._http = httpx.Client(
            base_url=url.rstrip("/"), timeout=timeout_s, headers={"Authorization": f"Bearer {token}"}, trust_env=False
        )

    def submit(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """POST /job/ as the documented form. Returns request_id, status, message. Raises ApiError."""
        form = {k: v if k in PLAIN else json.dumps(v) for k, v in spec.items()}
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
            wait=wait_exponential(multiplier=0.5, max=8),
            retry=retry_if_exception(_is_transient),
            reraise=True,
        )
        for attempt in attempts:
            with attempt:
                return self._once(method, path, request)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _once(self, method: str, path: str, request: dict[str, Any]) -> dict[str, Any]:
        response = self._http.request(method, path, **request)
        if response.is_success:
            body: dict[str, Any] = response.json()
            return body
        try:
            problem = response.json()
        except ValueError:
            problem = {}
        raise ApiError(response.status_code, problem.get("detail", response.reason_phrase), problem.get("errors", []))
