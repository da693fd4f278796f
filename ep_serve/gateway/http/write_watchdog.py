"""Detection of clients that do not read their responses."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

WRITE_TIMEOUT_S = 60.0
"""How long a client may read nothing of the write buffer."""


class WriteWatchdog:
    """Calls `on_timeout` if the write buffer of a transport makes no progress."""

    def __init__(self, transport: asyncio.Transport, on_timeout: Callable[[], None]) -> None:
        self._transport = transport
        self._on_timeout = on_timeout
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start or restart, unless the write buffer is empty."""
        self.stop()
        left = self._transport.get_write_buffer_size()
        if left:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(WRITE_TIMEOUT_S, self._check, left)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self, before: int) -> None:
        if self._transport.get_write_buffer_size() < before:
            self.start()
        else:
            self._on_timeout()
