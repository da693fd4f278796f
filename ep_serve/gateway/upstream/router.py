"""Route requests to engines and queue them while all are full.

Requests with the same medium go to the engine that has it cached: rendezvous hashing (Thaler and
Ravishankar, 1998) orders the engines for each medium, and the first one whose work stays within a
bound of the mean is selected (Mirrokni et al., "Consistent Hashing with Bounded Loads", 2018).
Requests without media go to the least loaded engine. No library combines the two.
"""

from __future__ import annotations

import asyncio
import bisect
import hashlib
import itertools
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep_serve.gateway.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import GatewaySettings
    from ep_serve.gateway.tracing import Tracing
    from ep_serve.gateway.upstream.circuit import Outcome
    from ep_serve.gateway.upstream.pool import Upstream, UpstreamPool

logger = logging.getLogger(__name__)

LIGHT_WORK = 8.0
"""An engine with at most this much work never counts as overloaded."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What the router needs to know about a request.

    `affinity` identifies its first medium, "" for none; `work` is its cost, 1 for a short text.
    """

    model: str
    affinity: str = ""
    work: float = 1.0
    priority: int = 0


@dataclass(slots=True)
class _QueuedRequest:
    rank: tuple[int, int]
    demand: Demand
    excluded: frozenset[str]
    future: asyncio.Future[Upstream]


def _rank(waiter: _QueuedRequest) -> tuple[int, int]:
    return waiter.rank


class Router:
    """Assigns engines to requests. Every acquired engine is returned with `release`."""

    def __init__(
        self,
        upstreams: UpstreamPool,
        settings: GatewaySettings,
        metrics: Metrics,
        tracing: Tracing,
    ) -> None:
        self._upstreams = upstreams
        self._routing = settings.routing
        self._queue = settings.queue
        self._metrics = metrics
        self._tracing = tracing
        self._waiting: list[_QueuedRequest] = []
        self._numbers = itertools.count()
        upstreams.on_available = self.dispatch

    async def acquire(self, demand: Demand, excluded: frozenset[str] = frozenset()) -> Upstream:
        """Return an engine for a request, as soon as one has a free slot.

        Args:
            demand: model, media, cost and priority of the request.
            excluded: names of engines that failed the request.

        Raises:
            ApiError: 404 for an unknown model, 503 if no engine is available, 429 if the
                queue is full or the wait timed out.
        """
        self._check_possible(demand)
        # Queued requests cannot use a free engine: `dispatch` runs after every change.
        if upstream := self._select(demand, excluded):
            return self._assign(upstream, demand)
        if len(self._waiting) >= self._queue.max_waiting:
            raise self._overloaded()
        async with self._tracing.span("queue", waiting=len(self._waiting)):
            return await self._wait(demand, excluded)

    def has_alternative(self, demand: Demand, excluded: frozenset[str]) -> bool:
        """Return whether an engine is left to retry on."""
        return bool(self._candidates(demand, excluded))

    def has_spare(self, demand: Demand) -> bool:
        """Return whether the model survives a crash of one engine, or has only one anyway."""
        serving = [one for one in self._upstreams.all if one.serves(demand.model)]
        return len(serving) == 1 or len(self._candidates(demand, frozenset())) > 1

    def release(self, upstream: Upstream, demand: Demand, outcome: Outcome | None) -> None:
        """Return an engine; `outcome` is None if it tells nothing about the engine."""
        upstream.end(demand.work, outcome)
        self._metrics.in_flight.dec()
        self.dispatch()

    def dispatch(self) -> None:
        """Assign free engines to queued requests in order of priority and arrival."""
        still: list[_QueuedRequest] = []
        full: set[tuple[str, frozenset[str]]] = set()
        for waiter in self._waiting:
            if waiter.future.done():
                continue
            wanted = waiter.demand.model, waiter.excluded
            upstream = None if wanted in full else self._select(waiter.demand, waiter.excluded)
            if upstream is None:
                full.add(wanted)  # stays full in this loop, which only adds work
                still.append(waiter)
            else:
                waiter.future.set_result(self._assign(upstream, waiter.demand))
        self._waiting = still
        self._metrics.queued.set(len(still))

    def _check_possible(self, demand: Demand) -> None:
        healthy = [upstream for upstream in self._upstreams.all if upstream.is_available]
        if not healthy:
            raise ApiError(
                503,
                "No engine is available at the moment.",
                code="no_upstream",
                retry_after=self._routing.health_interval_s,
            )
        if not any(upstream.serves(demand.model) for upstream in healthy):
            raise ApiError(
                404, "The model does not exist here.", code="model_not_found", param="model"
            )

    async def _wait(self, demand: Demand, excluded: frozenset[str]) -> Upstream:
        future: asyncio.Future[Upstream] = asyncio.get_running_loop().create_future()
        rank = (-demand.priority, next(self._numbers))
        bisect.insort(self._waiting, _QueuedRequest(rank, demand, excluded, future), key=_rank)
        self._metrics.queued.set(len(self._waiting))
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self._queue.timeout_s):
                return await asyncio.shield(future)
        except TimeoutError:
            if future.done() and not future.cancelled():
                return future.result()
            self._check_possible(demand)
            raise self._overloaded() from None
        except asyncio.CancelledError:
            if future.done() and not future.cancelled():
                self.release(future.result(), demand, None)
            raise
        finally:
            if not future.done():  # else `dispatch` has removed it
                self._waiting = [waiter for waiter in self._waiting if waiter.future is not future]
                self._metrics.queued.set(len(self._waiting))
            self._metrics.queue_seconds.observe(time.perf_counter() - began)

    def _overloaded(self) -> ApiError:
        self._metrics.refused.labels("queue").inc()
        return ApiError(
            429,
            "All engines are busy; the request could not start in time.",
            code="overloaded",
            retry_after=self._queue.timeout_s / 2,
        )

    def _assign(self, upstream: Upstream, demand: Demand) -> Upstream:
        upstream.begin(demand.work)
        self._metrics.in_flight.inc()
        return upstream

    def _select(self, demand: Demand, excluded: frozenset[str]) -> Upstream | None:
        able = self._candidates(demand, excluded)
        free = [upstream for upstream in able if not upstream.is_full]
        if not free:
            return None
        if not demand.affinity:
            return min(free, key=lambda upstream: (upstream.work, upstream.active))
        return self._select_by_affinity(demand, able)

    def _candidates(self, demand: Demand, excluded: frozenset[str]) -> list[Upstream]:
        return [
            upstream
            for upstream in self._upstreams.all
            if upstream.is_available
            and upstream.serves(demand.model)
            and upstream.name not in excluded
        ]

    def _select_by_affinity(self, demand: Demand, able: list[Upstream]) -> Upstream:
        """Select the first engine in rendezvous order that has a slot and is not overloaded."""
        mean = (sum(upstream.work for upstream in able) + demand.work) / len(able)
        bound = max(self._routing.load_bound * mean, demand.work, LIGHT_WORK)
        ordered = rendezvous(demand.affinity, able)
        free = [upstream for upstream in ordered if not upstream.is_full]
        within = (upstream for upstream in free if upstream.work + demand.work <= bound)
        chosen = next(within, None) or min(free, key=lambda upstream: upstream.work)
        self._metrics.affinity.labels("yes" if chosen is ordered[0] else "no").inc()
        return chosen


def rendezvous(key: str, upstreams: Iterable[Upstream]) -> list[Upstream]:
    """Sort engines by preference for a key; removing one moves only its own keys."""

    def score(upstream: Upstream) -> bytes:
        return hashlib.blake2b(f"{upstream.name}|{key}".encode(), digest_size=8).digest()

    return sorted(upstreams, key=score, reverse=True)
