"""Rate and concurrency limits of API keys."""

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
    """Counters of all keys in this process."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._windows = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._running: Counter[str] = Counter()

    async def count_request(self, key: Key) -> None:
        """Count a request; raise 429 above the rate limit."""
        await self._count(key, "requests", key.requests_per_minute, 1)

    async def count_media(self, key: Key, nbytes: int) -> None:
        """Count received bytes; raise 429 above the limit, 413 if `nbytes` alone exceeds it."""
        allowed = key.media_bytes_per_minute
        if allowed is not None and nbytes > allowed:
            raise ApiError(
                413,
                f"This key may send {allowed} media bytes per minute (got {nbytes} at once).",
                code="media_too_large",
            )
        await self._count(key, "media bytes", allowed, nbytes)

    @contextmanager
    def running(self, key: Key) -> Iterator[None]:
        """Count a request while it runs; raise 429 above the concurrency limit."""
        allowed = key.concurrent_requests
        if allowed is not None and self._running[key.name] >= allowed:
            self._metrics.refused.labels("concurrent_requests").inc()
            raise ApiError(
                429,
                f"This key may run at most {allowed} requests concurrently.",
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
            f"This key may send at most {allowed} {what} per minute.",
            code="rate_limit_exceeded",
            retry_after=min(60.0, max(1.0, reset - time.time())),
        )
