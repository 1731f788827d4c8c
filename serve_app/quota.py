"""How much an organisation may ask of the service: requests in a minute, and what holds a place for as long as it lasts."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator

from limits import RateLimitItem, parse

from serve_app.errors import ApiError
from serve_app.settings import Settings
from serve_app.store.quotas import Quota

PLACE_RETRY_AFTER_S = "10"


def default_quota(settings: Settings) -> Quota:
    """What an org may have that has no quota of its own."""
    return Quota(settings.max_running_jobs_per_org, settings.max_gpus_per_org, settings.max_queued_jobs_per_org)


class RateLimit:
    """A moving window per organisation, counted in this process. Thread-safe.

    Where several processes answer, each has an equal share of the rate, and one request at least, so that together they let in no
    more. One that is dealt more than its share refuses some a little earlier; a count that all share would cost every request a
    write in the store.
    `limits` parses the rate; its own window in memory starts a thread with almost every request.
    """

    def __init__(self, rate: str, processes: int = 1) -> None:
        self._item: RateLimitItem = parse(rate)
        self._window_s: int = self._item.get_expiry()
        self._share = max(1, self._item.amount // processes)
        self._hits = defaultdict[str, deque[float]](deque)  # by org, oldest first
        self._lock = threading.Lock()

    def check(self, org_id: str) -> None:
        """Count one request. Raises 429 with Retry-After, in seconds; one that is refused doesn't count."""
        now = time.monotonic()
        with self._lock:
            hits = self._hits[org_id]
            while hits and hits[0] <= now - self._window_s:
                hits.popleft()
            if len(hits) < self._share:
                hits.append(now)
                return
            wait_s = max(1, math.ceil(hits[0] + self._window_s - now))
        raise ApiError(
            429, f"too many requests: the limit is {self._item}; try again in {wait_s} s", headers={"Retry-After": str(wait_s)}
        )


class Places:
    """How many of `what` this process does at once: for one organisation, and in all. Thread-safe."""

    def __init__(self, what: str, per_org: int, in_all: int) -> None:
        self._what, self._per_org, self._in_all = what, per_org, in_all
        self._held = Counter[str]()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def hold(self, org_id: str) -> Iterator[None]:
        """Have a place. Raises 429 where the org has as many as it may, 503 where all are taken; both with Retry-After."""
        headers = {"Retry-After": PLACE_RETRY_AFTER_S}
        with self._lock:
            if self._held[org_id] >= self._per_org:
                message = f"this org has {self._per_org} {self._what} under way, as many as it may; try again when one has ended"
                raise ApiError(429, message, headers=headers)
            if self._held.total() >= self._in_all:
                message = f"there are {self._in_all} {self._what} under way, as many as there may be; try again shortly"
                raise ApiError(503, message, headers=headers)
            self._held[org_id] += 1
        try:
            yield
        finally:
            with self._lock:
                self._held[org_id] -= 1
