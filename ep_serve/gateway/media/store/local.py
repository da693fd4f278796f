"""The media store on disk: content-addressed, with a quota and expiry.

The directory contains `blobs/` (complete media), `incoming/` (unfinished uploads) and
`index.sqlite`. A medium is complete when it is renamed into `blobs/` and indexed when its row is
committed; what a crash leaves in between is removed at the next start.

Disk access never blocks the event loop. One thread owns the index and changes `blobs/`, so that
these operations are serialized; other threads write and hash uploads. Work in a thread completes
even if the request is cancelled.
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
from ep_serve.gateway.media.store.in_use import PinnedMedia
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
"""Bytes for pinned media in addition to files that fill the quota, or a quarter of the quota."""


class Store:
    """The media of one gateway process."""

    def __init__(self, settings: StoreSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._root = settings.path.absolute()
        self._blobs = self._root / "blobs"
        self._incoming = self._root / "incoming"
        self._in_use = PinnedMedia()
        self._index = Index(
            settings.quota_bytes, self._in_use, self._erase_blob, metrics.store_bytes.set
        )
        self.threads = DiskThreads()
        self._ending: set[asyncio.Task[None]] = set()
        self._lock: IO[str] | None = None

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, including unfinished uploads."""
        return self._index.used

    async def open(self) -> None:
        """Lock the directory and clean up after a crash.

        Raises:
            SettingsError: another process uses it, or it is not writable.
        """
        try:
            await self.threads.run_serialized(self._open)
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
        await self.threads.run_serialized(self._index.close)
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
        # Media of requests of the previous process cannot be referenced any more.
        self._index.remove_unnamed()
        known = self._index.blobs()
        for path in self._blobs.glob("*/*"):
            if known.get(path.name) == path.stat().st_size:
                del known[path.name]
            else:
                path.unlink()
        self._index.remove(known)
        self._index.clear_facts()  # the limits may have changed

    # -- media ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def receive(self, tenant: str = "") -> AsyncIterator[Upload]:
        """Yield an upload: `write` it, then `commit` it; otherwise it is discarded.

        A committed medium stays pinned until the end of the block.

        Args:
            tenant: tenant whose quota it uses; "" for none.
        """
        upload = Upload(self, self._incoming / secrets.token_hex(16), tenant)
        self._in_use.pin(upload.name, tenant)
        try:
            yield upload
        finally:
            # A task, because the caller may be cancelled again.
            ending = asyncio.create_task(upload.end())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            await asyncio.shield(ending)

    @asynccontextmanager
    async def pinned(self, digest: str, tenant: str = "") -> AsyncIterator[Path]:
        """Yield the path of a medium, which is pinned inside the block.

        Raises:
            ApiError: 404 if it does not exist.
        """
        self._in_use.pin(digest, tenant)
        try:
            nbytes, named = await self.threads.run_serialized(self._look_up, digest)
            if not named:  # files are counted by the quota
                self._in_use.resize(digest, nbytes)
            yield self.path(digest)
        finally:
            self._in_use.unpin(digest, tenant)

    def _look_up(self, digest: str) -> tuple[int, bool]:
        nbytes = self._index.size(digest)
        if nbytes is None or not self.path(digest).is_file():
            raise not_found()
        with suppress(sqlite3.Error):  # reading works on a full disk
            self._index.touch(digest)
        return nbytes, self._index.is_named(digest)

    async def facts(self, digest: str) -> dict[str, Any] | None:
        """Return the probed properties of a medium, or None."""
        return await self.threads.run_serialized(self._index.facts, digest)

    async def save_facts(self, digest: str, facts: dict[str, Any]) -> None:
        """Save the probed properties, unless the disk is full."""
        with suppress(ApiError):
            await self.threads.run_serialized(self._index.save_facts, digest, facts)

    async def sweep(self) -> None:
        """Remove expired media and files."""
        await self.threads.run_serialized(self._sweep)

    def _sweep(self) -> None:
        self._index.sweep(self._settings.media_ttl_s)
        self._index.evict_unnamed(0)

    # -- files ---------------------------------------------------------------------------------

    async def add_file(self, tenant: str, blob: Blob, name: str, purpose: str) -> File:
        """Create a durable file of a pinned medium.

        Raises:
            ApiError: 503 if the quota is used by files that must not be evicted.
        """
        file = new_file(tenant, blob, name, purpose, self._settings.file_ttl_s)
        await self.threads.run_parallel(_sync, self.path(blob.digest))
        await self.threads.run_serialized(self._add_file, file)
        return file

    def _add_file(self, file: File) -> None:
        nbytes = 0 if self._index.is_named(file.digest) else file.nbytes
        self._index.evict_files(file.tenant, nbytes)
        self._index.add_file(file)
        self._index.evict_unnamed(0)

    async def file(self, tenant: str, file_id: str) -> File:
        """Return a tenant's file; raise 404 if it is missing or expired."""
        file = await self.threads.run_serialized(self._index.file, tenant, file_id)
        if file is None:
            raise not_found()
        return file

    async def files(self, tenant: str, after: str | None, limit: int) -> list[File]:
        """List up to `limit` files of a tenant, newest first, older than the file `after`."""
        before = (await self.file(tenant, after)).number if after else _NEWER_THAN_ALL
        return await self.threads.run_serialized(self._index.files, tenant, before, limit)

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Delete a file, and its content if it has no other files."""
        file = await self.file(tenant, file_id)
        await self.threads.run_serialized(self._index.delete_file, file)

    # -- uploads -------------------------------------------------------------------------------

    async def reserve(self, upload: Upload, nbytes: int) -> None:
        """Reserve space for bytes of an upload.

        The content is not validated yet, so only media without files are evicted for it. Pinned
        media use the space beside files, or some spare space if files fill the quota.

        Raises:
            ApiError: 503 if the store is full, 429 if the tenant uses more than it leaves free. Its
                oldest upload is exempt, so that concurrent uploads do not all fail.
        """
        self._index.reserve(nbytes)
        upload.reserved += nbytes
        self._in_use.resize(upload.name, upload.reserved)
        quota, named = self._index.quota, self._index.named_bytes
        most = max(quota - named, min(quota, max(quota // 4, _SPARE)))
        free = most - self._in_use.nbytes
        if free < 0:
            raise storage_full()
        others = self._in_use.tenant_bytes(upload.tenant) - upload.reserved
        is_oldest = self._in_use.is_oldest(upload.name, upload.tenant)
        if upload.tenant and others > free and not is_oldest:
            raise ApiError(
                429, "Too many media of this client at once.", code="overloaded", retry_after=2
            )
        used_blobs = self._in_use.nbytes - self._index.reserved
        if self._index.used > quota and self._index.unnamed_bytes > used_blobs:
            await self.threads.run_serialized(self._index.evict_unnamed, 0)

    async def admit(self, upload: Upload, digest: str) -> Blob:
        """Move a complete upload into the store, pinned until the upload ends."""
        upload.digest = digest
        self._in_use.pin(digest, upload.tenant)
        nbytes = await self.threads.run_serialized(self._admit, upload, digest)
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
        """Remove the remains of an upload."""
        with suppress(ApiError):  # it is logged
            await self.threads.run_serialized(self._remove_partial, upload)
        self._in_use.unpin(upload.name, upload.tenant)
        if upload.digest is not None:
            self._in_use.unpin(upload.digest, upload.tenant)
            with suppress(ApiError):
                await self.threads.run_serialized(self._release_blob, upload.digest, upload.refused)

    def _release_blob(self, digest: str, refused: bool) -> None:
        if refused:
            self._index.remove_if_unused(digest)
        self._index.evict_unnamed(0)

    def _remove_partial(self, upload: Upload) -> None:
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
        """Return the path of a medium, whether it exists or not."""
        return self._blobs / digest[:2] / digest


def not_found() -> ApiError:
    """404 for a missing file or one of another tenant."""
    return ApiError(404, "The file does not exist.", code="file_not_found")


def _sync(path: Path) -> None:
    """Flush a file and its directory entry to disk."""
    for what in (path, path.parent):
        handle = os.open(what, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
