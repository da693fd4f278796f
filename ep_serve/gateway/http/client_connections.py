"""Connection limits and fair request scheduling of one port."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from prometheus_client import Counter

GRACE_S = 2.0
"""Seconds that a new connection is not closed before idle ones."""
STARTS = 16
"""Requests that start in one event loop iteration."""


class Closable(Protocol):
    """A connection."""

    def abort(self) -> None: ...


class FairScheduler:
    """Starts a few requests per event loop iteration, round robin over their senders.

    A burst of a thousand requests would otherwise delay later ones, including health checks, until
    all of them are parsed, validated and sent to an engine.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, deque[Callable[[], None]]] = OrderedDict()
        self._started = 0

    def start(self, sender: Callable[[], Hashable], action: Callable[[], None]) -> None:
        """Call `action`, now or in a later event loop iteration.

        Args:
            sender: returns the sender; called only if the request has to wait.
            action: starts the request.
        """
        if self._started == STARTS or self._waiting:
            self._waiting.setdefault(sender(), deque()).append(action)
            return
        if not self._started:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._started += 1
        action()

    def _next_turn(self) -> None:
        self._started = 0
        try:
            while self._waiting and self._started < STARTS:
                sender, actions = self._waiting.popitem(last=False)
                self._started += 1
                action = actions.popleft()
                if actions:
                    self._waiting[sender] = actions
                action()
        finally:
            if self._started:
                asyncio.get_running_loop().call_soon(self._next_turn)


class ClientConnections:
    """Limits of one server, and its connections without a running request.

    Above the limit such connections are closed instead of refusing new ones: first those that never
    sent a complete head, then idle ones, oldest first.

    Args:
        max_connections: limit of open connections.
        max_head_bytes: limit of the request line with headers, and of the chunk framing of a body.
        head_timeout_s: time until a head is complete.
        refused: counter of refused connections and requests, by reason.
        tenant_of: returns the tenant of an Authorization header, or None.
    """

    def __init__(
        self,
        max_connections: int,
        max_head_bytes: int,
        head_timeout_s: float,
        refused: Counter,
        tenant_of: Callable[[str | None], str | None],
    ) -> None:
        self.max_connections = max_connections
        self.max_head_bytes = max_head_bytes
        self.head_timeout_s = head_timeout_s
        self.queued_bytes = 0
        self.requests = FairScheduler()
        self.tenant_of = tenant_of
        self._refused = refused
        self._fresh: OrderedDict[Closable, float] = OrderedDict()
        self._idle: OrderedDict[Closable, float] = OrderedDict()

    def count_refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def mark_waiting(self, connection: Closable, now: float, *, fresh: bool) -> None:
        """Register a connection that waits for a request or for its end."""
        self.remove(connection)
        (self._fresh if fresh else self._idle)[connection] = now

    def remove(self, connection: Closable) -> None:
        """Unregister a connection that has a request or is closed."""
        self._fresh.pop(connection, None)
        self._idle.pop(connection, None)

    def close_excess(self, total: int, now: float) -> None:
        """Close waiting connections above `max_connections`.

        A few are kept even if all others are busy, so that health checks get through.
        """
        waiting = len(self._fresh) + len(self._idle)
        busy = total - waiting
        reserve = 8 + self.max_connections // 16
        for _ in range(waiting - max(reserve, self.max_connections - busy)):
            self.count_refused("connections")
            self._next_to_close(now).abort()

    def _next_to_close(self, now: float) -> Closable:
        """Remove and return the connection to close first."""
        oldest = next(iter(self._fresh.values()), now)
        fresh = self._fresh and (now - oldest > GRACE_S or not self._idle)
        return (self._fresh if fresh else self._idle).popitem(last=False)[0]
