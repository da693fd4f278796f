"""Media on disk, by their SHA-256: stored once, within a quota, for a time.

A folder holds `blobs/` (complete media), `incoming/` (what is being received) and `index.sqlite`. A
medium is complete when it is renamed into `blobs/` and is known when its row is committed; whatever
a crash leaves between the two is removed at the next start.

The event loop never waits for the disk. One thread owns the index and what moves in `blobs/`, so
that its steps never mix; other threads write and hash what is received. Work in a thread is done to
its end when a request that waits for it is cancelled.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import shutil
import sqlite3
from contextlib import asynccontextmanager, suppress
from typing import IO, TYPE_CHECKING, Any

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.store.in_use import InUse
from ep_serve.gateway.media.store.index import Blob, File, Index, new_file, storage_full
from ep_serve.gateway.media.store.threads import DiskThreads
from ep_serve.gateway.media.store.upload import Upload
from ep_serve.gateway.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import StoreSettings

_NEWER_THAN_ALL = 1 << 62
_SPARE = 256 << 20
"""Bytes that media in use may take beside files that fill the quota, or a quarter of the quota."""


class Store:
    """The media of one gateway process."""

    def __init__(self, settings: StoreSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._root = settings.path.absolute()
        self._blobs = self._root / "blobs"
        self._incoming = self._root / "incoming"
        self._in_use = InUse()
        self._index = Index(
            settings.quota_bytes, self._in_use, self._erase_blob, metrics.store_bytes.set
        )
        self.threads = DiskThreads()
        self._ending: set[asyncio.Task[None]] = set()
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
            await self.threads.in_order(self._open)
        except SettingsError:
            await self.close()
            raise
        except ApiError as error:
            await self.close()
            cause = error.__cause__
            reason = cause.strerror if isinstance(cause, OSError) else cause
            raise SettingsError(f"store.path: {self._root} cannot be used ({reason})") from None

    async def close(self) -> None:
        await asyncio.gather(*self._ending, return_exceptions=True)
        await self.threads.in_order(self._index.close)
        self.threads.close()
        if self._lock is not None:
            self._lock.close()

    def _open(self) -> None:
        try:
            self._blobs.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = (self._root / "lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self._incoming, ignore_errors=True)
            self._incoming.mkdir(exist_ok=True, mode=0o700)
        except BlockingIOError:
            raise SettingsError(f"store.path: another process uses {self._root}") from None
        self._index.open(self._root / "index.sqlite")
        self._repair()
        self._sweep()

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
    async def receive(self, tenant: str = "") -> AsyncIterator[Upload]:
        """Receive a medium: `write` it, then `commit` it; otherwise nothing of it stays.

        A committed medium stays until the end of the block at least.

        Args:
            tenant: whose share of the room it takes; "" for nobody's.
        """
        upload = Upload(self, self._incoming / secrets.token_hex(16), tenant)
        self._in_use.hold(upload.name, tenant)
        try:
            yield upload
        finally:
            # A task, because whoever receives may be cancelled a second time.
            ending = asyncio.create_task(upload.end())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            await asyncio.shield(ending)

    @asynccontextmanager
    async def pinned(self, digest: str, tenant: str = "") -> AsyncIterator[Path]:
        """The path of a medium, which stays there inside the block.

        Raises:
            ApiError: 404 if it is gone.
        """
        self._in_use.hold(digest, tenant)
        try:
            nbytes, named = await self.threads.in_order(self._look_up, digest)
            if not named:  # the quota has room for files
                self._in_use.resize(digest, nbytes)
            yield self.path(digest)
        finally:
            self._in_use.release(digest, tenant)

    def _look_up(self, digest: str) -> tuple[int, bool]:
        nbytes = self._index.size(digest)
        if nbytes is None or not self.path(digest).is_file():
            raise not_found()
        with suppress(sqlite3.Error):  # a full disk can still be read
            self._index.touch(digest)
        return nbytes, self._index.named(digest)

    async def facts(self, digest: str) -> dict[str, Any] | None:
        """What probing said about a medium."""
        return await self.threads.in_order(self._index.facts, digest)

    async def remember_facts(self, digest: str, facts: dict[str, Any]) -> None:
        """Note what probing said, if the disk has room."""
        with suppress(ApiError):
            await self.threads.in_order(self._index.remember_facts, digest, facts)

    async def sweep(self) -> None:
        """Remove what is too old."""
        await self.threads.in_order(self._sweep)

    def _sweep(self) -> None:
        self._index.sweep(self._settings.media_ttl_s)
        self._index.drop_unnamed(0)

    # -- files ---------------------------------------------------------------------------------

    async def add_file(self, tenant: str, blob: Blob, name: str, purpose: str) -> File:
        """Give a stored medium a name; it is in use. From then on it outlives a power failure.

        Raises:
            ApiError: 503 if files take all room, and none of them may be removed for it.
        """
        file = new_file(tenant, blob, name, purpose, self._settings.file_ttl_s)
        await self.threads.aside(_sync, self.path(blob.digest))
        await self.threads.in_order(self._add_file, file)
        return file

    def _add_file(self, file: File) -> None:
        nbytes = 0 if self._index.named(file.digest) else file.nbytes
        self._index.drop_files(file.tenant, nbytes)
        self._index.add_file(file)
        self._index.drop_unnamed(0)

    async def file(self, tenant: str, file_id: str) -> File:
        """A tenant's file; 404 if it has none of that id, or if it has expired."""
        file = await self.threads.in_order(self._index.file, tenant, file_id)
        if file is None:
            raise not_found()
        return file

    async def files(self, tenant: str, after: str | None, limit: int) -> list[File]:
        """Up to `limit` files of a tenant, newest first, older than the file `after`."""
        before = (await self.file(tenant, after)).number if after else _NEWER_THAN_ALL
        return await self.threads.in_order(self._index.files, tenant, before, limit)

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Forget a file, and its content if nobody else named it."""
        file = await self.file(tenant, file_id)
        await self.threads.in_order(self._index.drop_file, file)

    # -- uploads -------------------------------------------------------------------------------

    async def make_room(self, upload: Upload, nbytes: int) -> None:
        """Count bytes of an upload that are to be written.

        Nobody knows yet whether it is a medium, so only media without a name give way to it. What
        is in use fits beside the files, or takes some spare room if files fill the quota.

        Raises:
            ApiError: 503 if there is no room, 429 if the tenant uses more than it leaves free; its
                oldest is not refused for that, or media that grow side by side would all be.
        """
        self._index.reserve(nbytes)
        upload.reserved += nbytes
        self._in_use.resize(upload.name, upload.reserved)
        quota, named = self._index.quota, self._index.named_bytes
        most = max(quota - named, min(quota, max(quota // 4, _SPARE)))
        free = most - self._in_use.nbytes
        if free < 0:
            raise storage_full()
        others = self._in_use.of(upload.tenant) - upload.reserved
        if upload.tenant and others > free and not self._in_use.oldest(upload.name, upload.tenant):
            raise ApiError(
                429, "Too many media of this client at once.", code="overloaded", retry_after=2
            )
        used_blobs = self._in_use.nbytes - self._index.reserved
        if self._index.used > quota and self._index.unnamed_bytes > used_blobs:
            await self.threads.in_order(self._index.drop_unnamed, 0)

    async def admit(self, upload: Upload, digest: str) -> Blob:
        """Take a received medium into the store, where it stays until the upload ends."""
        upload.digest = digest
        self._in_use.hold(digest, upload.tenant)
        nbytes = await self.threads.in_order(self._admit, upload, digest)
        self._in_use.resize(digest, nbytes)
        self._in_use.resize(upload.name, 0)
        return Blob(digest, nbytes)

    def _admit(self, upload: Upload, digest: str) -> int:
        target = self.path(digest)
        nbytes = self._index.size(digest)
        if nbytes is not None and target.is_file():
            with suppress(sqlite3.Error):
                self._index.touch(digest)
            self._metrics.store_hits.inc()
            return nbytes
        target.parent.mkdir(exist_ok=True, mode=0o700)
        upload.path.rename(target)
        try:
            self._index.add(digest, upload.nbytes)
        except sqlite3.Error:
            target.unlink()
            raise
        self._metrics.store_misses.inc()
        self._index.reserve(-upload.reserved)
        upload.reserved = 0
        return upload.nbytes

    async def end(self, upload: Upload) -> None:
        """Forget what is left of an upload."""
        with suppress(ApiError):  # it is logged
            await self.threads.in_order(self._remove_rest, upload)
        self._in_use.release(upload.name, upload.tenant)
        if upload.digest is not None:
            self._in_use.release(upload.digest, upload.tenant)
            with suppress(ApiError):
                await self.threads.in_order(self._let_go, upload.digest, upload.refused)

    def _let_go(self, digest: str, refused: bool) -> None:
        if refused:
            self._index.release(digest)
        self._index.drop_unnamed(0)

    def _remove_rest(self, upload: Upload) -> None:
        try:
            upload.path.unlink(missing_ok=True)
        finally:
            self._index.reserve(-upload.reserved)
            upload.reserved = 0

    def _erase_blob(self, _: Sequence[File], digest: str | None) -> None:
        if digest is not None:
            self.path(digest).unlink(missing_ok=True)
            self._metrics.store_evicted.inc()

    def path(self, digest: str) -> Path:
        """Where a medium is, if it is stored."""
        return self._blobs / digest[:2] / digest


def not_found() -> ApiError:
    """404: the same for files that never were and files of others."""
    return ApiError(404, "There is no such file.", code="file_not_found")


def _sync(path: Path) -> None:
    """Let a file outlive a power failure, under its name."""
    for what in (path, path.parent):
        handle = os.open(what, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
