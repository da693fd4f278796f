"""An upload to the store."""

from __future__ import annotations

import asyncio
import hashlib
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Protocol

from ep_serve.gateway.errors import ApiError

if TYPE_CHECKING:
    from pathlib import Path

    from ep_serve.gateway.media.store.index import Blob
    from ep_serve.gateway.media.store.threads import DiskThreads

_BUFFER = 1 << 16
"""Bytes that are buffered before a thread writes them."""


class Receiver(Protocol):
    """The store that receives a medium."""

    threads: DiskThreads

    async def reserve(self, upload: Upload, nbytes: int) -> None: ...

    async def admit(self, upload: Upload, digest: str) -> Blob: ...

    async def end(self, upload: Upload) -> None: ...


class Upload:
    """An incoming medium. Bytes are reserved before they are written."""

    def __init__(self, store: Receiver, path: Path, tenant: str) -> None:
        self.nbytes = 0
        self.reserved = 0
        """Reserved bytes, until the medium is stored."""
        self.name = path.name
        self.path = path
        self.tenant = tenant
        self.digest: str | None = None
        self.refused = False
        """Whether it is removed when it is unpinned, because it was not accepted as a medium."""
        self._store = store
        self._hash = hashlib.sha256()
        self._file: IO[bytes] | None = None
        self._buffer = bytearray()
        self._writing: asyncio.Task[None] | None = None

    async def write(self, data: bytes) -> None:
        """Append bytes; see `Store.reserve` for errors."""
        self.nbytes += len(data)
        await self._store.reserve(self, len(data))
        self._buffer += data
        if len(self._buffer) >= _BUFFER:
            await self._flush()

    async def commit(self) -> Blob:
        """Store the medium; raise 422 if it is empty."""
        if not self.nbytes:
            raise ApiError(422, "The medium is empty (0 bytes).", code="media_refused")
        await self._flush(last=True)
        return await self._store.admit(self, self._hash.hexdigest())

    async def end(self) -> None:
        """Remove the remains after a pending write has finished."""
        if self._writing is not None:
            await asyncio.gather(self._writing, return_exceptions=True)
        if self._file is not None:
            with suppress(OSError):  # unwritten data is discarded anyway
                self._file.close()
        await self._store.end(self)

    async def _flush(self, *, last: bool = False) -> None:
        data, self._buffer = self._buffer, bytearray()
        work = self._store.threads.run_parallel(self._write, data, last)
        self._writing = asyncio.create_task(work)
        await asyncio.shield(self._writing)

    def _write(self, data: bytearray, last: bool) -> None:
        if self._file is None:
            self._file = self.path.open("xb")
        self._file.write(data)
        self._hash.update(data)
        if last:
            self._file.close()
