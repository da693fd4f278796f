"""Thread pools for disk access."""

from __future__ import annotations

import asyncio
import errno
import logging
import sqlite3
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from ep_serve.gateway.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_WRITERS = 4
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskThreads:
    """A single thread for serialized operations and a pool for slow ones.

    Started work completes even if the caller is cancelled.
    """

    def __init__(self) -> None:
        self._owner = ThreadPoolExecutor(1, "store")
        self._writers = ThreadPoolExecutor(_WRITERS, "store-writer")

    def close(self) -> None:
        """Wait for pending work and stop the threads."""
        self._owner.shutdown()
        self._writers.shutdown()

    async def run_serialized(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Run a function after all earlier serialized ones.

        Raises:
            ApiError: 507 if the disk is full, 503 if it fails in another way.
        """
        return await _done(self._owner, work, *arguments)

    async def run_parallel(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Run a function concurrently; raises the same errors."""
        return await _done(self._writers, work, *arguments)


async def _done(threads: Executor, work: Callable[..., _Result], *arguments: Any) -> _Result:
    doing = asyncio.get_running_loop().run_in_executor(threads, work, *arguments)
    doing.add_done_callback(_retrieve)
    try:
        return await asyncio.shield(doing)
    except (OSError, sqlite3.Error) as error:
        raise _storage_error(error) from error


def _retrieve(done: asyncio.Future[Any]) -> None:
    """Mark an exception as retrieved, because the caller may be cancelled."""
    if not done.cancelled():
        done.exception()


def _storage_error(error: OSError | sqlite3.Error) -> ApiError:
    """Log a disk error and return the error for the client."""
    if isinstance(error, OSError):
        full, reason = error.errno in _FULL, error.strerror
    else:
        code = getattr(error, "sqlite_errorcode", None)
        full, reason = code == sqlite3.SQLITE_FULL, str(error)
    logger.error("the media store cannot write", extra={"reason": reason})
    if full:
        return ApiError(507, "The disk of the media store is full.", code="disk_full")
    return ApiError(503, "The media store failed.", code="storage_unavailable", retry_after=5)
