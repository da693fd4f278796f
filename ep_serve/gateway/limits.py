"""What one key may do: requests and media bytes a minute, requests at the same time."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

from limits import RateLimitItemPerMinute
from limits.aio.storage import MemoryStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from ep_serve.gateway.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ep_serve.gateway.keys import Key
    from ep_serve.gateway.metrics import Metrics


class KeyLimits:
    """Counts for all keys, in this process."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._windows = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()

    async def request(self, key: Key) -> None:
        """Count a request; 429 if there were too many."""
        await self._count(key, "requests", key.requests_per_minute, 1)

    async def media(self, key: Key, nbytes: int) -> None:
        """Count received bytes; 429 if there were too many, 413 if they can never be allowed."""
        allowed = key.media_bytes_per_minute
        if allowed is not None and nbytes > allowed:
            raise ApiError(
                413,
                f"This key may send {allowed} bytes of media a minute (got {nbytes} at once).",
                code="media_too_large",
            )
        await self._count(key, "media bytes", allowed, nbytes)

    @contextmanager
    def running(self, key: Key) -> Iterator[None]:
        """Count a request as long as it runs; 429 if too many do."""
        allowed = key.concurrent_requests
        if allowed is not None and self._running[key.name] >= allowed:
            self._metrics.refused.labels("concurrent_requests").inc()
            raise ApiError(
                429,
                f"This key may run {allowed} requests at the same time.",
                code="concurrency_limit_exceeded",
                retry_after=1,
            )
        self._running[key.name] += 1
        try:
            yield
        finally:
            self._running[key.name] -= 1

    async def _count(self, key: Key, what: str, allowed: int | None, cost: int) -> None:
        if allowed is None:
            return
        item = RateLimitItemPerMinute(allowed)
        if await self._windows.hit(item, what, key.name, cost=cost):
            return
        self._metrics.refused.labels(what.replace(" ", "_")).inc()
        reset = (await self._windows.get_window_stats(item, what, key.name)).reset_time
        raise ApiError(
            429,
            f"This key may send {allowed} {what} a minute.",
            code="rate_limit_exceeded",
            retry_after=min(60.0, max(1.0, reset - time.time())),
        )
