"""Threads for work on a disk, which the event loop must not wait for."""

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
    """One thread for what has to happen in order, and some for what may take longer.

    Work that has begun is done to its end, even if the caller is cancelled.
    """

    def __init__(self) -> None:
        self._owner = ThreadPoolExecutor(1, "store")
        self._writers = ThreadPoolExecutor(_WRITERS, "store-writer")

    def close(self) -> None:
        """Wait for all work."""
        self._owner.shutdown()
        self._writers.shutdown()

    async def in_order(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Do something after everything that was begun before.

        Raises:
            ApiError: 507 if the disk is full, 503 if it fails in another way.
        """
        return await _done(self._owner, work, *arguments)

    async def aside(self, work: Callable[..., _Result], *arguments: Any) -> _Result:
        """Do something beside all else; raises the same."""
        return await _done(self._writers, work, *arguments)


async def _done(threads: Executor, work: Callable[..., _Result], *arguments: Any) -> _Result:
    doing = asyncio.get_running_loop().run_in_executor(threads, work, *arguments)
    doing.add_done_callback(_retrieve)
    try:
        return await asyncio.shield(doing)
    except (OSError, sqlite3.Error) as error:
        raise _storage_error(error) from error


def _retrieve(done: asyncio.Future[Any]) -> None:
    """Take note of an error: nobody may be left to hear of it."""
    if not done.cancelled():
        done.exception()


def _storage_error(error: OSError | sqlite3.Error) -> ApiError:
    """What a client is told when the disk fails, and a log entry."""
    if isinstance(error, OSError):
        full, reason = error.errno in _FULL, error.strerror
    else:
        code = getattr(error, "sqlite_errorcode", None)
        full, reason = code == sqlite3.SQLITE_FULL, str(error)
    logger.error("the media store cannot write", extra={"reason": reason})
    if full:
        return ApiError(507, "The disk of the media store is full.", code="disk_full")
    return ApiError(503, "The media store failed.", code="storage_unavailable", retry_after=5)
