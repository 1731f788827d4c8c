"""What the service answers: a JSON object, or an ApiError; and when it is worth asking again."""

from __future__ import annotations

from typing import Any

import httpx
from tenacity import RetryCallState, retry_if_exception, stop_after_attempt, wait_exponential

TRANSIENT = frozenset({429, 502, 503, 504})
MAX_TRIES = 5
LONGEST_WAIT_S = 30.0
_backoff_s = wait_exponential(multiplier=0.5, max=8)


class ApiError(Exception):
    """The service refused: HTTP status, its sentence, and the fields at fault.

    `by_service` is False where something on the way to it answered instead.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        errors: list[dict[str, Any]],
        retry_after_s: float | None = None,
        by_service: bool = True,
    ) -> None:
        self.status, self.detail, self.errors, self.retry_after_s = status, detail, errors, retry_after_s
        self.by_service = by_service
        lines = [f"  {e.get('field')}: {e.get('message')}" for e in errors]
        super().__init__("\n".join([f"{status}: {detail}", *(lines if len(lines) > 1 else [])]))


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, ApiError):
        # Ray Serve's proxy says 500 where a replica died over the request; our own 500 is a fault that stays.
        return error.status in TRANSIENT or (error.status == httpx.codes.INTERNAL_SERVER_ERROR and not error.by_service)
    return isinstance(error, httpx.TransportError)


def wait_s(state: RetryCallState) -> float:
    """As long as the service's Retry-After asks, within reason; else exponential."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, ApiError) else None
    return _backoff_s(state) if asked is None else min(max(0.0, asked), LONGEST_WAIT_S)


def retrying(retry: bool) -> dict[str, Any]:
    """The policy of every call, for tenacity."""
    stop = stop_after_attempt(MAX_TRIES if retry else 1)
    return {"stop": stop, "wait": wait_s, "retry": retry_if_exception(is_transient), "reraise": True}


def parse(response: httpx.Response) -> dict[str, Any]:
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
        by_service=isinstance(body, dict),
    )


def _seconds(text: str | None) -> float | None:
    return float(text) if text and text.isdecimal() else None
