"""Media on disk, by their SHA-256: stored once, within a quota, for a time.

A folder holds `blobs/` (complete media), `incoming/` (what is being received) and `index.sqlite`. A
medium is complete when it is renamed into `blobs/` and is known when its row is committed; whatever
a crash leaves between the two is removed at the next start.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import secrets
import shutil
from contextlib import asynccontextmanager
from typing import IO, TYPE_CHECKING, Any

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.index import Blob, File, Gone, Index, new_file
from ep_serve.gateway.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import StoreSettings

_BUFFER = 1 << 20
_NEWER_THAN_ALL = 1 << 62


class Store:
    """The media of one gateway process."""

    def __init__(self, settings: StoreSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._root = settings.path.absolute()
        self._blobs = self._root / "blobs"
        self._incoming = self._root / "incoming"
        self._index = Index(settings.quota_bytes, metrics.store_bytes.set)
        self._lock: IO[str] | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, those of unfinished uploads too."""
        return self._index.used

    async def open(self) -> None:
        """Take the folder over and repair what a crash left.

        Raises:
            SettingsError: another process has it, or it cannot be written.
        """
        try:
            self._blobs.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (self._root / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self._incoming, ignore_errors=True)
            self._incoming.mkdir(exist_ok=True, mode=0o700)
            self._index.open(self._root / "index.sqlite")
        except BlockingIOError:
            raise SettingsError(f"store.path: another process uses {self._root}") from None
        except OSError as error:
            raise SettingsError(
                f"store.path: {self._root} cannot be used ({error.strerror})"
            ) from None
        self._repair()
        await self.sweep()

    async def close(self) -> None:
        self._index.close()
        if self._lock is not None:
            self._lock.close()

    def _repair(self) -> None:
        # Nobody can name a medium that came with a request of the process before.
        self._index.forget_unnamed()
        known = self._index.blobs()
        for path in self._blobs.glob("*/*"):
            if known.get(path.name) == path.stat().st_size:
                del known[path.name]
            else:
                path.unlink()
        self._index.forget(known)
        self._index.forget_facts()  # the limits may have changed

    # -- media ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def receive(self, *, durable: bool = False) -> AsyncIterator[Upload]:
        """Receive a medium: `write` it, then `commit` it; otherwise nothing of it stays.

        Args:
            durable: whether a committed medium outlives a power failure, at the cost of a sync.
        """
        upload = Upload(self, self._incoming / secrets.token_hex(16), durable)
        try:
            yield upload
        finally:
            await upload.discard()
            self._index.count(-upload.reserved)

    @asynccontextmanager
    async def pinned(self, digest: str) -> AsyncIterator[Path]:
        """The path of a medium, which stays there inside the block.

        Raises:
            ApiError: 404 if it is gone.
        """
        with self._index.pinned(digest):
            path = self._path(digest)
            if not path.is_file():
                raise not_found()
            self._index.touch(digest)
            yield path

    def facts(self, digest: str) -> dict[str, Any] | None:
        """What probing said about a medium."""
        return self._index.facts(digest)

    def remember_facts(self, digest: str, facts: dict[str, Any]) -> None:
        self._index.remember_facts(digest, facts)

    async def sweep(self) -> None:
        """Remove what is too old."""
        self._remove(self._index.sweep(self._settings.media_ttl_s))

    def discard_unused(self, digest: str) -> None:
        """Remove a medium that turned out to be refused, unless somebody else uses it."""
        self._remove(self._index.release(digest))

    # -- files ---------------------------------------------------------------------------------

    async def add_file(self, tenant: str, blob: Blob, name: str, purpose: str) -> File:
        """Give a stored medium a name."""
        file = new_file(tenant, blob, name, purpose, self._settings.file_ttl_s)
        self._index.add_file(file)
        return file

    async def file(self, tenant: str, file_id: str) -> File:
        """A tenant's file; 404 if it has none of that id."""
        file = self._index.file(tenant, file_id)
        if file is None:
            raise not_found()
        return file

    async def files(self, tenant: str, after: str | None, limit: int) -> list[File]:
        """Up to `limit` files of a tenant, newest first, older than the file `after`."""
        before = (await self.file(tenant, after)).number if after else _NEWER_THAN_ALL
        return self._index.files(tenant, before, limit)

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Forget a file, and its content if nobody else named it."""
        file = await self.file(tenant, file_id)
        self._index.remove_file(file_id)
        self.discard_unused(file.digest)

    # -- room ----------------------------------------------------------------------------------

    def reserve(self, nbytes: int) -> None:
        """Make room for bytes to come; 503 if there is none."""
        self._remove(self._index.make_room(nbytes))

    def admit(self, digest: str, nbytes: int, incoming: Path, *, durable: bool) -> Blob:
        """Take a received medium into the store. Runs on the event loop: two renames, two rows."""
        target = self._path(digest)
        if target.is_file() and self._index.touch(digest):
            self._metrics.store_hits.inc()
            return Blob(digest, nbytes)
        target.parent.mkdir(exist_ok=True, mode=0o700)
        incoming.rename(target)
        if durable:
            _sync_folder(target.parent)
        self._index.add(digest, nbytes)
        self._metrics.store_misses.inc()
        return Blob(digest, nbytes)

    def _remove(self, gone: Gone) -> None:
        # Their rows went first: a crash now leaves files that the next start removes.
        for digest in gone.blobs:
            self._path(digest).unlink(missing_ok=True)
            self._metrics.store_evicted.inc()

    def _path(self, digest: str) -> Path:
        return self._blobs / digest[:2] / digest


class Upload:
    """A medium that is being received. Bytes count for the quota before they are written."""

    def __init__(self, store: Store, path: Path, durable: bool) -> None:
        self.nbytes = 0
        self.reserved = 0
        self._store = store
        self._path = path
        self._durable = durable
        self._hash = hashlib.sha256()
        self._file: IO[bytes] | None = None
        self._buffer = bytearray()
        self._writing: asyncio.Task[None] | None = None

    async def write(self, data: bytes) -> None:
        """Add bytes; 503 if there is no room for them."""
        self._store.reserve(len(data))
        self.reserved += len(data)
        self.nbytes += len(data)
        self._buffer += data
        if len(self._buffer) >= _BUFFER:
            await self._flush()

    async def commit(self) -> Blob:
        """Keep what was written; 422 if that was nothing."""
        if not self.nbytes:
            raise ApiError(422, "The medium is empty (0 bytes).", code="media_refused")
        await self._flush(last=True)
        digest = self._hash.hexdigest()
        return self._store.admit(digest, self.nbytes, self._path, durable=self._durable)

    async def discard(self) -> None:
        """Remove what is left, once a thread that still writes has finished."""
        if self._writing is not None:
            await asyncio.wait([self._writing])
        if self._file is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)

    async def _flush(self, *, last: bool = False) -> None:
        data, self._buffer = bytes(self._buffer), bytearray()
        self._writing = asyncio.create_task(asyncio.to_thread(self._write, data, last))
        await asyncio.shield(self._writing)

    def _write(self, data: bytes, last: bool) -> None:
        if self._file is None:
            self._file = self._path.open("xb")
        self._file.write(data)
        self._hash.update(data)
        if last:
            self._file.flush()
            if self._durable:
                os.fsync(self._file.fileno())
            self._file.close()


def not_found() -> ApiError:
    """404: the same for files that never were and files of others."""
    return ApiError(404, "There is no such file.", code="file_not_found")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
