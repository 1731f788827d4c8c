"""Server-sent events (WHATWG HTML, 9.2) as they come from a socket, and when to connect again."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx

from serve_app.client.answers import LONGEST_WAIT_S, ApiError, gives_up, is_transient, parse

SSE = "text/event-stream"
RECONNECT_S = 1.0
LONGEST_BACKOFF_S = 8.0
TIMEOUT = httpx.Timeout(30, read=60)  # a quiet stream sends a comment every 15 s
# Not str.splitlines, as the HTTP library's iter_lines does: it splits at U+2028 and U+0085 too, inside of JSON strings.
_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventStream:
    """One job's stream over as many connections as it takes: bytes in, entries out, the last id kept for a reconnect."""

    def __init__(self) -> None:
        self.ended = False
        self._last_id: str | None = None
        self._retry_s = RECONNECT_S
        self._failures, self._failing_since = 0, 0.0
        self._forget()

    def _forget(self) -> None:
        self._rest, self._after_cr = b"", False
        self._id, self._kind, self._data = self._last_id, "", list[str]()

    def headers(self) -> dict[str, str]:
        """What to ask with, the first time and again."""
        return {"Accept": SSE} | ({"Last-Event-ID": self._last_id} if self._last_id else {})

    def opened(self, answer: httpx.Response) -> None:
        """Begin a connection; half an event of the one before is forgotten. Raises ApiError for what is no stream."""
        if answer.status_code == httpx.codes.NO_CONTENT:
            self.ended = True
            return
        if not answer.is_success:
            parse(answer)
        if not answer.headers.get("Content-Type", SSE).startswith(SSE):
            raise ApiError(answer.status_code, f"{answer.url.host} didn't answer with a stream: is this Tuneyard's URL?", [])
        self._failures = 0
        self._forget()

    def feed(self, block: bytes) -> Iterator[dict[str, Any]]:
        """Take what has arrived; give the entries that it completes."""
        if self._after_cr and block.startswith(b"\n"):
            block = block[1:]  # the other half of a \r\n
        elif not block:
            return
        self._after_cr = block.endswith(b"\r")
        *lines, self._rest = _LINE_END.split(self._rest + block)
        for line in lines:
            if line:
                self._field(line.decode(errors="replace"))
            elif (entry := self._dispatch()) is not None:
                yield entry

    def _field(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._kind = value
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and value.isdecimal():
            self._retry_s = min(int(value) / 1000, LONGEST_WAIT_S)

    def _dispatch(self) -> dict[str, Any] | None:
        """The entry that a blank line completes. Only now its id counts: a connection may break in the middle of an event."""
        self._last_id = self._id
        kind, data = self._kind, "\n".join(self._data)
        self._kind, self._data = "", []
        if kind == "end":
            self.ended = True
        if self.ended or not data:
            return None
        try:
            entry: dict[str, Any] = json.loads(data)
        except ValueError:
            raise ApiError(200, "the stream holds something else than JSON: is this Tuneyard's URL?", []) from None
        return entry

    def wait_s(self, error: Exception | None) -> float:
        """How long to wait before connecting again. Raises the error where that is no use, or was tried often enough."""
        if error is None:
            return self._retry_s
        if not self._failures:
            self._failing_since = time.monotonic()
        self._failures += 1
        if not is_transient(error) or gives_up(error, self._failures, time.monotonic() - self._failing_since):
            raise error
        asked = error.retry_after_s if isinstance(error, ApiError) else None
        # Exponential; the first time as the stream itself has asked.
        waits = min(self._retry_s * 2 ** (self._failures - 1), LONGEST_BACKOFF_S)
        return waits if asked is None else min(asked, LONGEST_WAIT_S)
