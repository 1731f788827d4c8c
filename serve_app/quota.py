"""How much an organisation may ask of the service: requests in a minute, and what holds a place for as long as it lasts."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from serve_app.errors import ApiError

PLACE_RETRY_AFTER_S = "10"


class RateLimit:
    """A moving window per organisation, counted in this process. Thread-safe."""

    def __init__(self, rate: str) -> None:
        self._item: RateLimitItem = parse(rate)
        self._window = MovingWindowRateLimiter(MemoryStorage())

    def check(self, org_id: str) -> None:
        """Count one request. Raises 429 with Retry-After, in seconds."""
        if not self._window.hit(self._item, org_id):
            free_at = self._window.get_window_stats(self._item, org_id).reset_time
            wait_s = max(1, math.ceil(free_at - time.time()))
            raise ApiError(429, f"more than {self._item} requests; try again in {wait_s} s", headers={"Retry-After": str(wait_s)})


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
