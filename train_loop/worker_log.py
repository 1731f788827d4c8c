"""A worker's log lines on their way to the monitor: what it logs and prints, batched, never blocking the loop."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
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


class _Handler(logging.Handler):
    def __init__(self, lines: _Lines, stream: TextIO) -> None:
        super().__init__(logging.INFO)
        self._lines, self._stream = lines, stream
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        for line in self.format(record).splitlines():
            self._lines.add(line)
            self._stream.write(line + "\n")  # the worker's own file on its machine


class _Tee:
    """A text stream that also collects what is written to it. Progress bars (lines that end in \\r) are left out."""

    def __init__(self, stream: TextIO, lines: _Lines) -> None:
        self._stream, self._lines, self._rest = stream, lines, ""

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            if line.strip() and not line.startswith("\r"):
                self._lines.add(line)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def shipped(send: Callable[[list[Line]], None]) -> Iterator[Callable[[], None]]:
    """Inside, what train_loop logs (from INFO) and what this process prints goes to `send`, about once a second.

    Other libraries' loggers print where they see fit, which counts as printing.

    What is left goes when the block ends, however it ends; what is yielded sends it at once.
    """
    lines, done = _Lines(), threading.Event()
    handler, ours = _Handler(lines, sys.stderr), logging.getLogger("train_loop")
    level, streams = ours.level, (sys.stdout, sys.stderr)

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
    sys.stdout, sys.stderr = _Tee(sys.stdout, lines), _Tee(sys.stderr, lines)  # type: ignore[assignment]
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
