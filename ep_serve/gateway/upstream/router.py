"""Which engine gets a request, and who waits until one has room.

Requests about one medium meet the engine that remembers it: rendezvous hashing (Thaler and
Ravishankar, 1998) orders the engines for each medium, and the first one whose work stays within a
bound of the mean is taken (Mirrokni et al., "Consistent Hashing with Bounded Loads", 2018).
Requests without media go where the least work is. Both fit on a screen and no library has them
together.
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
    from ep_serve.gateway.upstream.pool import Upstream, Upstreams

logger = logging.getLogger(__name__)

LIGHT_WORK = 8.0
"""An engine with no more work than this is not overloaded, however idle the others are."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks of an engine.

    `affinity` names its media, "" if it has none; `work` is its cost, 1 for a short text.
    """

    model: str
    affinity: str = ""
    work: float = 1.0
    priority: int = 0


@dataclass(slots=True)
class _Waiter:
    rank: tuple[int, int]
    demand: Demand
    avoid: frozenset[str]
    place: asyncio.Future[Upstream]


def _rank(waiter: _Waiter) -> tuple[int, int]:
    return waiter.rank


class Router:
    """Gives out engines. Every engine taken is given back with `release`."""

    def __init__(
        self,
        upstreams: Upstreams,
        settings: GatewaySettings,
        metrics: Metrics,
        tracing: Tracing,
    ) -> None:
        self._upstreams = upstreams
        self._routing = settings.routing
        self._queue = settings.queue
        self._metrics = metrics
        self._tracing = tracing
        self._waiting: list[_Waiter] = []
        self._numbers = itertools.count()
        upstreams.changed = self.wake

    async def take(self, demand: Demand, avoid: frozenset[str] = frozenset()) -> Upstream:
        """An engine for a request, as soon as one has room.

        Args:
            demand: what the request asks for.
            avoid: names of engines that failed it and are not taken.

        Raises:
            ApiError: 404 for an unknown model, 503 if no engine works, 429 if none has room.
        """
        self._check_possible(demand)
        # What is there now, nobody who waits could take: `wake` follows every change.
        if upstream := self._pick(demand, avoid):
            return self._begin(upstream, demand)
        if len(self._waiting) >= self._queue.max_waiting:
            raise self._busy()
        async with self._tracing.span("queue", waiting=len(self._waiting)):
            return await self._wait(demand, avoid)

    def has_other(self, demand: Demand, avoid: frozenset[str]) -> bool:
        """Whether an engine that did not fail yet could be tried."""
        return bool(self._able(demand, avoid))

    def has_spare(self, demand: Demand) -> bool:
        """Whether others can be served if one engine ends, or the model has only one anyway."""
        serving = [one for one in self._upstreams.all if one.serves(demand.model)]
        return len(serving) == 1 or len(self._able(demand, frozenset())) > 1

    def release(self, upstream: Upstream, demand: Demand, outcome: Outcome | None) -> None:
        """Give an engine back; `outcome` is None if it says nothing about the engine."""
        upstream.end(demand.work, outcome)
        self._metrics.in_flight.dec()
        self.wake()

    def wake(self) -> None:
        """Let those go on who wait for what is there now, in their order."""
        still: list[_Waiter] = []
        full: set[tuple[str, frozenset[str]]] = set()
        for waiter in self._waiting:
            if waiter.place.done():
                continue
            wanted = waiter.demand.model, waiter.avoid
            upstream = None if wanted in full else self._pick(waiter.demand, waiter.avoid)
            if upstream is None:
                full.add(wanted)  # and it stays so here: engines only get more work
                still.append(waiter)
            else:
                waiter.place.set_result(self._begin(upstream, waiter.demand))
        self._waiting = still
        self._metrics.queued.set(len(still))

    def _check_possible(self, demand: Demand) -> None:
        healthy = [upstream for upstream in self._upstreams.all if upstream.available]
        if not healthy:
            raise ApiError(
                503,
                "No engine can work at the moment.",
                code="no_upstream",
                retry_after=self._routing.health_interval_s,
            )
        if not any(upstream.serves(demand.model) for upstream in healthy):
            raise ApiError(
                404, "The model does not exist here.", code="model_not_found", param="model"
            )

    async def _wait(self, demand: Demand, avoid: frozenset[str]) -> Upstream:
        place: asyncio.Future[Upstream] = asyncio.get_running_loop().create_future()
        rank = (-demand.priority, next(self._numbers))
        bisect.insort(self._waiting, _Waiter(rank, demand, avoid, place), key=_rank)
        self._metrics.queued.set(len(self._waiting))
        began = time.perf_counter()
        try:
            async with asyncio.timeout(self._queue.timeout_s):
                return await asyncio.shield(place)
        except TimeoutError:
            if place.done() and not place.cancelled():
                return place.result()
            self._check_possible(demand)
            raise self._busy() from None
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self.release(place.result(), demand, None)
            raise
        finally:
            if not place.done():  # else `wake` has removed it
                self._waiting = [waiter for waiter in self._waiting if waiter.place is not place]
                self._metrics.queued.set(len(self._waiting))
            self._metrics.queue_seconds.observe(time.perf_counter() - began)

    def _busy(self) -> ApiError:
        self._metrics.refused.labels("queue").inc()
        return ApiError(
            429,
            "All engines are busy; the request could not start in time.",
            code="overloaded",
            retry_after=self._queue.timeout_s / 2,
        )

    def _begin(self, upstream: Upstream, demand: Demand) -> Upstream:
        upstream.begin(demand.work)
        self._metrics.in_flight.inc()
        return upstream

    def _pick(self, demand: Demand, avoid: frozenset[str]) -> Upstream | None:
        able = self._able(demand, avoid)
        free = [upstream for upstream in able if not upstream.full]
        if not free:
            return None
        if not demand.affinity:
            return min(free, key=lambda upstream: (upstream.work, upstream.active))
        return self._near(demand, able)

    def _able(self, demand: Demand, avoid: frozenset[str]) -> list[Upstream]:
        return [
            upstream
            for upstream in self._upstreams.all
            if upstream.available and upstream.serves(demand.model) and upstream.name not in avoid
        ]

    def _near(self, demand: Demand, able: list[Upstream]) -> Upstream:
        """The engine that knows the media, or the next one in their order that has room."""
        mean = (sum(upstream.work for upstream in able) + demand.work) / len(able)
        bound = max(self._routing.load_bound * mean, demand.work, LIGHT_WORK)
        ordered = rendezvous(demand.affinity, able)
        free = [upstream for upstream in ordered if not upstream.full]
        within = (upstream for upstream in free if upstream.work + demand.work <= bound)
        chosen = next(within, None) or min(free, key=lambda upstream: upstream.work)
        self._metrics.affinity.labels("yes" if chosen is ordered[0] else "no").inc()
        return chosen


def rendezvous(key: str, upstreams: Iterable[Upstream]) -> list[Upstream]:
    """Engines in the order of preference of a key; the loss of one moves only its own keys."""

    def score(upstream: Upstream) -> bytes:
        return hashlib.blake2b(f"{upstream.name}|{key}".encode(), digest_size=8).digest()

    return sorted(upstreams, key=score, reverse=True)
