"""What the programs in a user's data may take: a chat template is one, and its author may be anyone."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

MAX_RENDER_S = 20.0  # of CPU, for one row; a row takes a millisecond
LOOK_S = 0.5
MORE_BYTES = 4 << 30  # that preparing may take beyond what its process has when it begins


class Stalled(Exception):
    """A template goes on and on."""


class _Watch:
    """Ends what takes too long of its thread, by an exception there. It comes between two steps of Python's, never within one.

    It counts the thread's own time on a CPU: on a busy machine, or one that was suspended, nothing is ended for waiting.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: tuple[int, float] | None = None  # the thread, and its clock's time when it is enough
        self._looks = False

    def begin(self) -> None:
        if not self._looks:
            self._looks = True
            threading.Thread(target=self._look, name="template-watch", daemon=True).start()
        with self._lock:
            self._until = threading.get_ident(), time.thread_time() + MAX_RENDER_S

    def end(self) -> None:
        with self._lock:
            self._until = None

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_S)
            with self._lock:
                if self._until is None:
                    continue
                thread, enough = self._until
                if time.clock_gettime(time.pthread_getcpuclockid(thread)) > enough:
                    self._until = None
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Stalled))


_watch = _Watch()


def _start_afresh() -> None:
    global _watch
    _watch = _Watch()  # threads don't survive a fork


os.register_at_fork(after_in_child=_start_afresh)


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Inside, Stalled is raised after MAX_RENDER_S. One thread of a process at a time."""
    _watch.begin()
    try:
        yield
    finally:
        _watch.end()


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Inside, this process may take MORE_BYTES more of memory; then allocations fail, instead of the machine."""
    status = Path("/proc/self/status")
    if not status.exists():  # not on this system
        yield
        return
    (data,) = [line for line in status.read_text().splitlines() if line.startswith("VmData:")]
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bound = int(data.split()[1]) * 1024 + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (bound if soft == resource.RLIM_INFINITY else min(soft, bound), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
