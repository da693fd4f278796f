"""The connections of clients to one port: which are closed first, and whose request is next."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from prometheus_client import Counter

GRACE_S = 2.0
"""How long a new connection is not the first to be closed."""
STARTS = 16
"""Requests that start in one turn of the event loop."""


class Closable(Protocol):
    """A connection."""

    def abort(self) -> None: ...


class FairStart:
    """Starts requests, a few in each turn of the event loop, and those who send them in rotation.

    A thousand requests that arrive at once would otherwise hold up everybody who comes later,
    health checks too, until each of them is parsed, checked and on its way to an engine.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[Hashable, deque[Callable[[], None]]] = OrderedDict()
        self._started = 0

    def start(self, sender: Callable[[], Hashable], action: Callable[[], None]) -> None:
        """Call `action`, now or in one of the next turns.

        Args:
            sender: names who sends it, and is called only if somebody has to wait.
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
        while self._waiting and self._started < STARTS:
            sender, actions = self._waiting.popitem(last=False)
            self._started += 1
            action = actions.popleft()
            if actions:
                self._waiting[sender] = actions
            action()
        if self._started:
            asyncio.get_running_loop().call_soon(self._next_turn)


class ClientConnections:
    """Limits of one server, and its connections that wait for a request.

    A connection that waits for a request is closed before anybody is refused. First those go that
    have never sent a whole head, then those that are idle; of each the oldest.

    Args:
        max_connections: how many may be open.
        max_head_bytes: request line and headers of a request, and the framing around its body.
        head_timeout_s: until a head is complete.
        refused: counts what was refused, by reason.
        tenant_of: the tenant that an Authorization header belongs to, or None.
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
        self.requests = FairStart()
        self.tenant_of = tenant_of
        self._refused = refused
        self._fresh: OrderedDict[Closable, float] = OrderedDict()
        self._idle: OrderedDict[Closable, float] = OrderedDict()

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def waits(self, connection: Closable, now: float, *, fresh: bool) -> None:
        """A connection waits for a request, or only for its end."""
        self.forget(connection)
        (self._fresh if fresh else self._idle)[connection] = now

    def forget(self, connection: Closable) -> None:
        """A connection has a request, or is gone."""
        self._fresh.pop(connection, None)
        self._idle.pop(connection, None)

    def make_room(self, total: int, now: float) -> None:
        """Close connections that wait until there are no more than `max_connections`.

        A few more may wait for a head even if all others are at work: that of a health check, for
        example.
        """
        waiting = len(self._fresh) + len(self._idle)
        busy = total - waiting
        reserve = 8 + self.max_connections // 16
        for _ in range(waiting - max(reserve, self.max_connections - busy)):
            self.refused("connections")
            self._next_to_close(now).abort()

    def _next_to_close(self, now: float) -> Closable:
        """Remove and give the connection that is closed first."""
        oldest = next(iter(self._fresh.values()), now)
        fresh = self._fresh and (now - oldest > GRACE_S or not self._idle)
        return (self._fresh if fresh else self._idle).popitem(last=False)[0]
