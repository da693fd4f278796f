"""A fair semaphore for several tenants."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict, deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class FairSlots:
    """A semaphore that no tenant can exhaust.

    A tenant may hold up to twice as many slots as it leaves free, so a single tenant gets two
    thirds of them. Waiting tenants are served round robin. The tenant "" stands for all clients
    where tenants are not distinguished, and may hold all slots.
    """

    def __init__(self, number: int) -> None:
        self._free = number
        self._held: Counter[str] = Counter()
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def acquire(self, tenant: str) -> None:
        """Wait for a slot; `release` returns it."""
        if tenant not in self._waiting and self._fits(tenant):
            self._take(tenant)
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # the slot was granted at the same time
                self.release(tenant)
            self._grant()
            raise

    def release(self, tenant: str) -> None:
        self._free += 1
        self._held[tenant] -= 1
        if not self._held[tenant]:
            del self._held[tenant]
        self._grant()

    @asynccontextmanager
    async def slot(self, tenant: str) -> AsyncIterator[None]:
        """Hold a slot inside the block."""
        await self.acquire(tenant)
        try:
            yield
        finally:
            self.release(tenant)

    def _fits(self, tenant: str) -> bool:
        return self._free > 0 and (not tenant or self._held[tenant] < 2 * self._free)

    def _take(self, tenant: str) -> None:
        self._free -= 1
        self._held[tenant] += 1

    def _grant(self) -> None:
        granted = True
        while granted:
            granted = False
            for tenant in list(self._waiting):
                turns = self._waiting[tenant]
                while turns and turns[0].cancelled():
                    turns.popleft()
                if turns and self._fits(tenant):
                    self._take(tenant)
                    turns.popleft().set_result(None)
                    self._waiting.move_to_end(tenant)
                    granted = True
                if not turns:
                    del self._waiting[tenant]
