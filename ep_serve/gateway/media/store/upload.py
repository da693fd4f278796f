"""A medium on its way into the store."""

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
"""Bytes that are handed to a thread at once."""


class Receiver(Protocol):
    """The store that receives a medium."""

    threads: DiskThreads

    async def make_room(self, upload: Upload, nbytes: int) -> None: ...

    async def admit(self, upload: Upload, digest: str) -> Blob: ...

    async def end(self, upload: Upload) -> None: ...


class Upload:
    """A medium that is being received. Bytes count for the quota before they are written."""

    def __init__(self, store: Receiver, path: Path, tenant: str) -> None:
        self.nbytes = 0
        self.reserved = 0
        """Bytes that the store counts, until the medium is one of its blobs."""
        self.name = path.name
        self.path = path
        self.tenant = tenant
        self.digest: str | None = None
        self.refused = False
        """Whether it goes as soon as nobody uses it, because it is not known to be a medium."""
        self._store = store
        self._hash = hashlib.sha256()
        self._file: IO[bytes] | None = None
        self._buffer = bytearray()
        self._writing: asyncio.Task[None] | None = None

    async def write(self, data: bytes) -> None:
        """Add bytes; see `Store.make_room` for when there is no room for them."""
        self.nbytes += len(data)
        await self._store.make_room(self, len(data))
        self._buffer += data
        if len(self._buffer) >= _BUFFER:
            await self._flush()

    async def commit(self) -> Blob:
        """Keep what was written; 422 if that was nothing."""
        if not self.nbytes:
            raise ApiError(422, "The medium is empty (0 bytes).", code="media_refused")
        await self._flush(last=True)
        return await self._store.admit(self, self._hash.hexdigest())

    async def end(self) -> None:
        """Remove what is left, once a thread that still writes has finished."""
        if self._writing is not None:
            await asyncio.gather(self._writing, return_exceptions=True)
        if self._file is not None:
            with suppress(OSError):  # what could not be written is not wanted either
                self._file.close()
        await self._store.end(self)

    async def _flush(self, *, last: bool = False) -> None:
        data, self._buffer = self._buffer, bytearray()
        self._writing = asyncio.create_task(self._store.threads.aside(self._write, data, last))
        await asyncio.shield(self._writing)

    def _write(self, data: bytearray, last: bool) -> None:
        if self._file is None:
            self._file = self.path.open("xb")
        self._file.write(data)
        self._hash.update(data)
        if last:
            self._file.close()
