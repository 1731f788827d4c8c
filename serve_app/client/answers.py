"""What the service answers: a JSON object, or an ApiError; and when it is worth asking again."""

from __future__ import annotations

import logging
from typing import Any

import httpx
from tenacity import RetryCallState, retry_if_exception, wait_exponential

TRANSIENT = frozenset({429, 502, 503, 504})
MAX_TRIES = 5
PATIENCE_S = 60.0  # an ingress replica that was killed is back in some seconds, on a busy machine in half a minute
LONGEST_WAIT_S = 30.0
_backoff_s = wait_exponential(multiplier=0.5, max=8)
_log = logging.getLogger(__name__)


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
        lines = [f"{e.get('field')}: {e.get('message')}" for e in errors]
        if lines and detail.startswith(lines[0]):  # the sentence says the first
            lines = lines[1:]
        super().__init__("\n  ".join([f"{status}: {detail}", *lines]))


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


def gives_up(error: BaseException, tries: int, for_s: float) -> bool:
    """Whether a call that has failed so often, for so many seconds, is tried no more.

    Where nothing listens, a URL may be wrong, and its user shouldn't wait a minute to hear of it.
    """
    return tries >= MAX_TRIES and (for_s >= PATIENCE_S or isinstance(error, httpx.ConnectError))


def retrying(retry: bool) -> dict[str, Any]:
    """The policy of every call, for tenacity."""

    def stop(state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        return not retry or error is None or gives_up(error, state.attempt_number, state.seconds_since_start or 0.0)

    return {
        "stop": stop,
        "wait": wait_s,
        "retry": retry_if_exception(is_transient),
        "before_sleep": _say_so,
        "reraise": True,
    }


def _say_so(state: RetryCallState) -> None:
    """Nobody should wonder why a command stands still."""
    if state.attempt_number >= MAX_TRIES and state.outcome and (error := state.outcome.exception()):
        _log.warning("%s; still trying", str(error).partition("\n")[0] or type(error).__name__)


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
