"""A worker's log lines on their way to the monitor: what it logs and prints, batched, never blocking the loop.

The worker's own file on its machine gets the same lines as JSON, each with what tells whose it is.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

FLUSH_S = 1.0
MAX_LINE_CHARS = 4000
MAX_PENDING = 2000  # lines; a flood loses its middle, never the run's memory

Line = tuple[float, str]  # Unix time, text


class _Lines:
    """Collects whole lines from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[Line] = []
        self._dropped = 0

    def add(self, text: str) -> None:
        with self._lock:
            if len(self._pending) >= MAX_PENDING:
                self._dropped += 1
            else:
                self._pending.append((time.time(), text[:MAX_LINE_CHARS]))

    def take(self) -> list[Line]:
        with self._lock:
            taken, self._pending = self._pending, []
            if self._dropped:
                taken.append((time.time(), f"[{self._dropped} lines left out: more than {MAX_PENDING} a second]"))
                self._dropped = 0
            return taken


class _Own:
    """The worker's own file: a stream of JSON lines."""

    def __init__(self, stream: TextIO, fields: Mapping[str, Any]) -> None:
        self._stream, self._fields = stream, fields

    def write(self, text: str, **more: Any) -> None:
        line = {**self._fields, "event": text, **more, "timestamp": dt.datetime.now(dt.UTC).isoformat()}
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()


class _Handler(logging.Handler):
    def __init__(self, lines: _Lines, own: _Own) -> None:
        super().__init__(logging.INFO)
        self._lines, self._own = lines, own
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self._lines.add(line)
        told = {"exception": record.exc_text} if record.exc_text else {}  # by what formatted it
        self._own.write(record.getMessage(), level=record.levelname.lower(), logger=record.name, **told)


class _Tee:
    """A text stream whose lines are collected, and go to the worker's file; not progress bars (lines that end in \\r)."""

    def __init__(self, stream: TextIO, lines: _Lines, own: _Own) -> None:
        self._stream, self._lines, self._own, self._rest = stream, lines, own, ""

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            if line.strip() and not line.startswith("\r"):
                self._lines.add(line)
                self._own.write(line[:MAX_LINE_CHARS], level="info", logger="printed")
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def shipped(send: Callable[[list[Line]], None], **fields: Any) -> Iterator[Callable[[], None]]:
    """Inside, what train_loop logs (from INFO) and what this process prints goes to `send`, about once a second.

    Other libraries' loggers print where they see fit, which counts as printing. `fields` stand in each line of the worker's file.

    What is left goes when the block ends, however it ends; what is yielded sends it at once.
    """
    lines, done = _Lines(), threading.Event()
    own, ours, streams = _Own(sys.stderr, fields), logging.getLogger("train_loop"), (sys.stdout, sys.stderr)
    handler, level = _Handler(lines, own), ours.level

    def flush() -> None:
        if taken := lines.take():
            send(taken)

    def loop() -> None:
        while not done.wait(FLUSH_S):
            flush()

    thread = threading.Thread(target=loop, name="worker-log", daemon=True)
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False  # or a handler of Ray's prints each line once more
    sys.stdout, sys.stderr = (_Tee(stream, lines, own) for stream in streams)  # type: ignore[assignment]
    thread.start()
    try:
        yield flush
    except BaseException:
        ours.exception("this worker failed")
        raise
    finally:
        sys.stdout, sys.stderr = streams
        ours.removeHandler(handler)
        ours.setLevel(level)
        ours.propagate = True
        done.set()
        thread.join()
        flush()
