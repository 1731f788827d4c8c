"""How much an organisation may ask of the service: requests in a minute, jobs in the queue."""

from __future__ import annotations

import math
import time

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from serve_app.errors import ApiError


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
