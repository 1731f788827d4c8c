"""A run that hangs: no step for many times what a step takes. It is seen, its stacks are logged, and its process ends.

Two watchers, because a process can hang in two ways: a thread of Python's for one that waits (for another rank, a lock, a disk),
and faulthandler's thread in C for one that is stuck with Python's lock held.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Literal

log = logging.getLogger(__name__)

FLOOR_S = 600.0
FACTOR = 20.0
RECENT_STEPS = 50
SLOW = 6  # loading a model or uploading may take so many times longer than what else comes between two beats
BACKSTOP = 1.25  # faulthandler comes after the thread, which can say more
LINGER_S = 3.0  # before the end, so that the other ranks, which hang with this one, log their stacks too
EXIT_CODE = 70

Beat = Literal["step", "other", "slow"]


class StepClock:
    """How long to wait for the next step: `factor` times the median of recent ones, at least `floor_s`."""

    def __init__(self, floor_s: float = FLOOR_S, factor: float = FACTOR) -> None:
        self.floor_s = floor_s
        self.factor = factor
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)

    def took(self, step_s: float) -> None:
        """Note the duration of a step."""
        self._recent.append(step_s)

    @property
    def limit_s(self) -> float:
        """Silence longer than this is a hang."""
        return max(self.floor_s, self.factor * statistics.median(self._recent)) if self._recent else self.floor_s


class Watchdog:
    """Ends this process when its beats stop. Use as a context manager around what beats."""

    def __init__(self, clock: StepClock, on_hang: Callable[[str], None]) -> None:
        self._clock = clock
        self._on_hang = on_hang
        self._beat_at = self._armed_at = time.monotonic()
        self._step_at: float | None = None
        self._limit_s = SLOW * clock.limit_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def beat(self, kind: Beat = "other") -> None:
        """Say that the run goes on. "step" ends a step; "slow" when something follows that may take much longer than one."""
        now = time.monotonic()
        if kind == "step":
            if self._step_at is not None:
                self._clock.took(now - self._step_at)
            self._step_at = now
        limit_s = self._clock.limit_s * (SLOW if kind == "slow" else 1)
        self._beat_at, changed, self._limit_s = now, limit_s != self._limit_s, limit_s
        if changed or now - self._armed_at > 0.1 * limit_s:  # it starts a thread each time
            self._arm()

    def _arm(self) -> None:
        self._armed_at = time.monotonic()
        faulthandler.dump_traceback_later(BACKSTOP * self._limit_s + 2 * LINGER_S, exit=True, file=2)

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._limit_s / 4)):
            silent_s = time.monotonic() - self._beat_at
            if silent_s > self._limit_s:
                self._end(silent_s)

    def _end(self, silent_s: float) -> None:
        log.error("no step for %.0f s: this worker hangs; its threads are at\n%s", silent_s, stacks())
        try:
            self._on_hang(f"No step for {silent_s:.0f} s, where {self._limit_s:.0f} s is the limit.")
            time.sleep(LINGER_S)
        finally:
            os._exit(EXIT_CODE)  # nothing less ends a process whose threads hang


def stacks() -> str:
    """What every thread of this process is doing."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
