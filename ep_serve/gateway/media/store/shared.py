"""A media store whose files are in an S3 bucket that several gateways share.

The disk holds media of requests and cached copies of files. The bucket is authoritative for files:
each access reads their metadata from it, so that uploads and deletions of other gateways take
effect at once. A second index mirrors the bucket for its quota.

Gateways delete objects without coordination. Three rules make that safe: a file is written after
its blob, a blob is deleted only after the index was refreshed, and a file without a blob counts as
deleted. The quota does not include what other gateways added since the last refresh.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakValueDictionary

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.store.bucket import Bucket
from ep_serve.gateway.media.store.in_use import PinnedMedia
from ep_serve.gateway.media.store.index import Blob, File, Index, new_file
from ep_serve.gateway.media.store.local import Store, not_found
from ep_serve.gateway.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
    from pathlib import Path

    from ep_serve.gateway.media.store.bucket import Stored
    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import S3Settings, StoreSettings

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

ORPHAN_S = 3_600.0
"""Minimum age of a blob without files; newer ones may be uploads of other gateways."""
_READERS = 16
_FILE_ID = re.compile(r"file-[\w-]{1,100}", re.ASCII)


class SharedStore(Store):
    """A store with shared files in a bucket and local media."""

    def __init__(self, settings: StoreSettings, s3: S3Settings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        self._bucket = Bucket(s3)
        self._where = f"{s3.bucket} at {s3.endpoint or s3.region}"
        self._pending_deletes: tuple[list[File], list[str]] = ([], [])
        self._shared_pins = PinnedMedia()
        self._shared = Index(
            s3.quota_bytes, self._shared_pins, self._schedule_delete, metrics.bucket_bytes.set
        )
        self._interval = s3.sync_interval_s
        self._refreshed_at = 0.0
        self._refresh_lock = asyncio.Lock()
        self._readers = asyncio.Semaphore(_READERS)
        self._moves: set[asyncio.Task[None]] = set()
        self._moving: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def open(self) -> None:
        """Lock the directory and index the bucket.

        Raises:
            SettingsError: the directory or the bucket cannot be used.
        """
        await super().open()
        await self.threads.run_serialized(self._shared.open, None)
        try:
            await self._refresh_index()
        except ApiError as error:
            await self.close()
            reason = str(error.__cause__).partition("\n")[0][:300]
            raise SettingsError(
                f"store.s3: the bucket {self._where} cannot be used ({reason})"
            ) from None

    async def close(self) -> None:
        for move in self._moves:
            move.cancel()
        await asyncio.gather(*self._moves, return_exceptions=True)
        await self.threads.run_serialized(self._shared.close)
        await super().close()

    @asynccontextmanager
    async def pinned(self, digest: str, tenant: str = "") -> AsyncIterator[Path]:
        """Yield the path of a pinned medium, downloaded from the bucket if necessary."""
        self._in_use.pin(digest, tenant)
        try:
            if not await self.threads.run_serialized(self.path(digest).is_file):
                await self._copy(digest, tenant)
            async with super().pinned(digest, tenant) as path:
                yield path
        finally:
            self._in_use.unpin(digest, tenant)

    async def sweep(self) -> None:
        """Remove expired media and files on disk and in the bucket."""
        await super().sweep()
        if self._refreshed_at and time.monotonic() >= self._refreshed_at + self._interval:
            await self._refresh_index()
            await self.threads.run_serialized(self._shared.sweep, ORPHAN_S)
            await self._delete_pending()

    # -- files ---------------------------------------------------------------------------------

    async def add_file(self, tenant: str, blob: Blob, name: str, purpose: str) -> File:
        """Upload a pinned medium to the bucket and create its file."""
        file = new_file(tenant, blob, name, purpose, self._settings.file_ttl_s)
        await self._run_to_completion(self._add(file))
        return file

    async def _add(self, file: File) -> None:
        async with self._blob_lock(file.digest):
            self._shared_pins.pin(file.digest, file.tenant)
            self._in_use.pin(file.digest, file.tenant)
            try:
                # A blob without files may be deleted by another gateway.
                named = await self.threads.run_serialized(self._shared.is_named, file.digest)
                there = named and await self._bucket.has(file.digest)
                await self._put(file, 0 if there else file.nbytes)
            finally:
                self._shared_pins.unpin(file.digest, file.tenant)
                self._in_use.unpin(file.digest, file.tenant)

    async def file(self, tenant: str, file_id: str) -> File:
        """Return a tenant's file from the bucket."""
        found = None
        if _FILE_ID.fullmatch(file_id):
            found = await self._bucket.file(tenant, file_id)
        if found is None or found.tenant != tenant or found.expires <= time.time():
            await self.threads.run_serialized(self._shared.remove_file, file_id)
            raise not_found()
        await self.threads.run_serialized(self._note, found)
        return found

    async def files(self, tenant: str, after: str | None, limit: int) -> list[File]:
        """List up to `limit` files of a tenant, newest first, older than the file `after`."""
        if after and not _FILE_ID.fullmatch(after):
            raise not_found()
        ids = await self._bucket.file_ids(tenant, after, limit)

        async def known(file_id: str) -> File | None:
            async with self._readers:
                found = await self.threads.run_serialized(self._shared.file, tenant, file_id)
                return found or await self._bucket.file(tenant, file_id)

        found = await _gather_all(known(file_id) for file_id in ids)
        return [file for file in found if file is not None and file.expires > time.time()]

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Delete a file, and its content if it has no other files."""
        file = await self.file(tenant, file_id)
        await self._run_to_completion(self._delete(file))

    async def _delete(self, file: File) -> None:
        await self._bucket.delete([file], [])
        await self.threads.run_serialized(self._shared.remove_file, file.id)
        await self._refresh_index()
        await self.threads.run_serialized(self._shared.remove_if_unused, file.digest)
        await self._delete_pending()
        await self.threads.run_serialized(self._index.remove_if_unused, file.digest)

    # -- transfers -----------------------------------------------------------------------------

    async def _run_to_completion(self, move: Coroutine[Any, Any, None]) -> None:
        """Complete an operation on the bucket even if the caller is cancelled."""
        task = asyncio.create_task(move)
        self._moves.add(task)
        try:
            await asyncio.shield(task)
        finally:
            task.add_done_callback(self._move_done)

    def _move_done(self, task: asyncio.Task[None]) -> None:
        self._moves.discard(task)
        if not task.cancelled():
            task.exception()  # mark as retrieved

    async def _put(self, file: File, nbytes: int) -> None:
        """Upload a file and, if `nbytes` is not 0, its content."""
        if self._shared.used + nbytes > self._shared.quota:
            await self._refresh_index()
        self._shared.reserve(nbytes)
        try:
            await self.threads.run_serialized(self._evict, file.tenant, nbytes)
            await self._delete_pending()
            if nbytes:
                await self._bucket.put(file.digest, self.path(file.digest))
            await self._bucket.put_file(file)
            await self.threads.run_serialized(self._note, file, nbytes)
        except BaseException:
            self._shared.reserve(-nbytes)
            raise

    def _evict(self, tenant: str, nbytes: int) -> None:
        self._shared.evict_unnamed(0)
        self._shared.evict_files(tenant, nbytes, concurrent=self._shared.reserved - nbytes)

    async def _copy(self, digest: str, tenant: str) -> None:
        """Download a blob and verify its digest."""
        async with self._blob_lock(digest):
            if await self.threads.run_serialized(self.path(digest).is_file):
                return
            async with (
                self.receive(tenant) as upload,
                aclosing(self._bucket.chunks(digest)) as chunks,
            ):
                async for chunk in chunks:
                    await upload.write(chunk)
                if upload.nbytes and (await upload.commit()).digest != digest:
                    logger.error("a blob in the bucket does not match its digest")

    def _schedule_delete(self, files: Sequence[File], digest: str | None) -> None:
        self._pending_deletes[0].extend(files)
        self._pending_deletes[1].extend([digest] if digest is not None else [])

    def _take_pending_deletes(self) -> tuple[list[File], list[str]]:
        gone, self._pending_deletes = self._pending_deletes, ([], [])
        return gone

    async def _delete_pending(self) -> None:
        """Delete from the bucket what was removed from the index."""
        files, blobs = await self.threads.run_serialized(self._take_pending_deletes)
        await self._bucket.delete(files, blobs)
        self._metrics.store_evicted.inc(len(blobs))

    # -- synchronization -----------------------------------------------------------------------

    async def _refresh_index(self) -> None:
        """Refresh the index from the bucket, without undoing concurrent changes of this gateway."""
        async with self._refresh_lock:
            files_before, blobs_before = await self.threads.run_serialized(self._known_ids)
            paths = (
                await self._bucket.file_paths()
            )  # before the blobs, which are written before files
            blobs = await self._bucket.blobs()
            new = await self._read(path for name, path in paths.items() if name not in files_before)
            lost, deleted = blobs_before - blobs.keys(), files_before - paths.keys()
            await self.threads.run_serialized(self._apply_changes, lost, deleted, blobs, new)
            await self._bucket.delete([file for file in new if file.digest not in blobs], [])
            self._refreshed_at = time.monotonic()

    def _known_ids(self) -> tuple[set[str], set[str]]:
        return self._shared.file_ids(), set(self._shared.blobs())

    def _apply_changes(
        self, lost: set[str], deleted: set[str], blobs: dict[str, Stored], new: list[File]
    ) -> None:
        self._shared.remove(lost, erase=False)
        for file_id in deleted:
            self._shared.remove_file(file_id)
        for digest, stored in blobs.items():
            self._shared.add(digest, stored.nbytes, stored.written)
        for file in new:
            if file.digest in blobs:
                self._shared.add_file(file)

    async def _read(self, paths: Iterable[str]) -> list[File]:
        async def read(path: str) -> File | None:
            async with self._readers:
                return await self._bucket.read(path)

        found = await _gather_all(read(path) for path in paths)
        return [file for file in found if file is not None]

    def _note(self, file: File, reserved: int = 0) -> None:
        self._shared.add(file.digest, file.nbytes)
        self._shared.add_file(file)
        self._shared.touch(file.digest)
        self._shared.reserve(-reserved)

    @asynccontextmanager
    async def _blob_lock(self, digest: str) -> AsyncIterator[None]:
        """Serialize transfers of a blob."""
        lock = self._moving.setdefault(digest, asyncio.Lock())
        async with lock:
            yield


async def _gather_all(work: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """Gather results and cancel the rest when one fails."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
