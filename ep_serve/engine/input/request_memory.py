"""Bounds the memory for what requests bring: bodies, and files that are fetched for them.

vLLM reads bodies of any size and keeps each for as long as its request runs; it fetches any number
of files at the same time.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from http import HTTPStatus

from vllm.exceptions import GracefulHTTPError


class RequestMemory:
    """The bytes that requests of this process hold. Thread-safe."""

    def __init__(self, limit: int = 1 << 32) -> None:
        self.limit = limit
        self._used = 0
        # A finalizer may give memory back in the thread that holds it, whenever objects are made.
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> None:
        """Count bytes as held.

        Raises:
            GracefulHTTPError: they would exceed the limit (HTTP 503).
        """
        with self._lock:
            used = self._used
            if used + nbytes <= self.limit:
                self._used = used + nbytes
                return
        raise GracefulHTTPError(
            f"The server is busy: requests hold {used} bytes of memory, {nbytes} more would exceed "
            f"the limit of {self.limit} (request_memory_gib). Try again later.",
            HTTPStatus.SERVICE_UNAVAILABLE,
        )

    def give_back(self, nbytes: int) -> None:
        """Count bytes as free again."""
        with self._lock:
            self._used -= nbytes


request_memory = RequestMemory()
"""That of this process; `config_hook.py` sets the limit."""


class Share:
    """What one body or file holds of the memory. Not thread-safe."""

    def __init__(self, memory: RequestMemory = request_memory) -> None:
        self.memory = memory
        self.nbytes = 0

    def take(self, nbytes: int) -> None:
        """Hold more.

        Raises:
            GracefulHTTPError: as `RequestMemory.take`.
        """
        self.memory.take(nbytes)
        self.nbytes += nbytes

    def release(self) -> None:
        self.memory.give_back(self.nbytes)
        self.nbytes = 0


fetching: ContextVar[Share | None] = ContextVar("fetching", default=None)
"""Counts what the current task downloads."""
