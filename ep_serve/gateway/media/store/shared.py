"""A store whose files lie in a bucket that several gateways share.

The disk stays what it was, for media of requests and for copies of files that are in use. The
bucket is what counts for files: each use of a file asks it, so that a file that another gateway
received is found, and one that another gateway deleted is not. A second index follows what is in
the bucket, for its quota.

Several gateways remove things without asking each other. Three rules make that harmless: a file is
written after its blob, a blob is removed only after a fresh look at all files, and a file whose
blob is gone is gone. Their quota is exact for what each knows; what others added since the last
look comes on top.
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
from ep_serve.gateway.media.store.in_use import InUse
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
"""A blob that no file names may belong to an upload that another gateway is about to finish."""
_READERS = 16
_FILE_ID = re.compile(r"file-[\w-]{1,100}", re.ASCII)


class SharedStore(Store):
    """The files of several gateways, and the media of this one."""

    def __init__(self, settings: StoreSettings, s3: S3Settings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        self._bucket = Bucket(s3)
        self._where = f"{s3.bucket} at {s3.endpoint or s3.region}"
        self._gone: tuple[list[File], list[str]] = ([], [])
        self._sharing = InUse()
        self._shared = Index(
            s3.quota_bytes, self._sharing, self._erase_later, metrics.bucket_bytes.set
        )
        self._interval = s3.sync_interval_s
        self._looked = 0.0
        self._looking = asyncio.Lock()
        self._readers = asyncio.Semaphore(_READERS)
        self._moves: set[asyncio.Task[None]] = set()
        self._moving: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def open(self) -> None:
        """Take the folder over, and learn what is in the bucket.

        Raises:
            SettingsError: the folder or the bucket cannot be used.
        """
        await super().open()
        await self.threads.in_order(self._shared.open, None)
        try:
            await self._look()
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
        await self.threads.in_order(self._shared.close)
        await super().close()

    @asynccontextmanager
    async def pinned(self, digest: str, tenant: str = "") -> AsyncIterator[Path]:
        """The path of a medium on disk, copied there if only the bucket has it."""
        self._in_use.hold(digest, tenant)
        try:
            if not await self.threads.in_order(self.path(digest).is_file):
                await self._copy(digest, tenant)
            async with super().pinned(digest, tenant) as path:
                yield path
        finally:
            self._in_use.release(digest, tenant)

    async def sweep(self) -> None:
        """Remove what is too old, here and in the bucket."""
        await super().sweep()
        if self._looked and time.monotonic() >= self._looked + self._interval:
            await self._look()
            await self.threads.in_order(self._shared.sweep, ORPHAN_S)
            await self._erase()

    # -- files ---------------------------------------------------------------------------------

    async def add_file(self, tenant: str, blob: Blob, name: str, purpose: str) -> File:
        """Put a medium into the bucket and give it a name; it is in use on disk."""
        file = new_file(tenant, blob, name, purpose, self._settings.file_ttl_s)
        await self._whole(self._add(file))
        return file

    async def _add(self, file: File) -> None:
        async with self._alone(file.digest):
            self._sharing.hold(file.digest, file.tenant)
            self._in_use.hold(file.digest, file.tenant)
            try:
                # One without a name may be about to be removed by another gateway.
                named = await self.threads.in_order(self._shared.named, file.digest)
                there = named and await self._bucket.has(file.digest)
                await self._put(file, 0 if there else file.nbytes)
            finally:
                self._sharing.release(file.digest, file.tenant)
                self._in_use.release(file.digest, file.tenant)

    async def file(self, tenant: str, file_id: str) -> File:
        """A tenant's file, as the bucket knows it now."""
        found = None
        if _FILE_ID.fullmatch(file_id):
            found = await self._bucket.file(tenant, file_id)
        if found is None or found.tenant != tenant or found.expires <= time.time():
            await self.threads.in_order(self._shared.remove_file, file_id)
            raise not_found()
        await self.threads.in_order(self._note, found)
        return found

    async def files(self, tenant: str, after: str | None, limit: int) -> list[File]:
        """Up to `limit` files of a tenant, newest first, older than the file `after`."""
        if after and not _FILE_ID.fullmatch(after):
            raise not_found()
        ids = await self._bucket.file_ids(tenant, after, limit)

        async def known(file_id: str) -> File | None:
            async with self._readers:
                found = await self.threads.in_order(self._shared.file, tenant, file_id)
                return found or await self._bucket.file(tenant, file_id)

        found = await _all(known(file_id) for file_id in ids)
        return [file for file in found if file is not None and file.expires > time.time()]

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Forget a file, and its content if no gateway knows another name for it."""
        file = await self.file(tenant, file_id)
        await self._whole(self._delete(file))

    async def _delete(self, file: File) -> None:
        await self._bucket.erase([file], [])
        await self.threads.in_order(self._shared.remove_file, file.id)
        await self._look()
        await self.threads.in_order(self._shared.release, file.digest)
        await self._erase()
        await self.threads.in_order(self._index.release, file.digest)

    # -- between disk and bucket ---------------------------------------------------------------

    async def _whole(self, move: Coroutine[Any, Any, None]) -> None:
        """Do something to the bucket to its end, even if the caller is cancelled."""
        task = asyncio.create_task(move)
        self._moves.add(task)
        try:
            await asyncio.shield(task)
        finally:
            task.add_done_callback(self._moved)

    def _moved(self, task: asyncio.Task[None]) -> None:
        self._moves.discard(task)
        if not task.cancelled():
            task.exception()  # whoever would have heard of it may be gone

    async def _put(self, file: File, nbytes: int) -> None:
        """Put a file into the bucket, and its content of so many bytes if it is not there."""
        if self._shared.used + nbytes > self._shared.quota:
            await self._look()
        self._shared.reserve(nbytes)
        try:
            await self.threads.in_order(self._make_room, file.tenant, nbytes)
            await self._erase()
            if nbytes:
                await self._bucket.put(file.digest, self.path(file.digest))
            await self._bucket.put_file(file)
            await self.threads.in_order(self._note, file, nbytes)
        except BaseException:
            self._shared.reserve(-nbytes)
            raise

    def _make_room(self, tenant: str, nbytes: int) -> None:
        self._shared.drop_unnamed(0)
        self._shared.drop_files(tenant, nbytes, beside=self._shared.reserved - nbytes)

    async def _copy(self, digest: str, tenant: str) -> None:
        """Bring a blob to disk, if it is in the bucket and what its name says."""
        async with self._alone(digest):
            if await self.threads.in_order(self.path(digest).is_file):
                return
            async with (
                self.receive(tenant) as upload,
                aclosing(self._bucket.chunks(digest)) as chunks,
            ):
                async for chunk in chunks:
                    await upload.write(chunk)
                if upload.nbytes and (await upload.commit()).digest != digest:
                    logger.error("a blob in the bucket is not what its name says")

    def _erase_later(self, files: Sequence[File], digest: str | None) -> None:
        self._gone[0].extend(files)
        self._gone[1].extend([digest] if digest is not None else [])

    def _take_gone(self) -> tuple[list[File], list[str]]:
        gone, self._gone = self._gone, ([], [])
        return gone

    async def _erase(self) -> None:
        """Erase in the bucket what has left the index."""
        files, blobs = await self.threads.in_order(self._take_gone)
        await self._bucket.erase(files, blobs)
        self._metrics.store_evicted.inc(len(blobs))

    # -- what others did -----------------------------------------------------------------------

    async def _look(self) -> None:
        """Bring the index up to date. What this gateway does meanwhile is left as it is."""
        async with self._looking:
            files_before, blobs_before = await self.threads.in_order(self._known)
            paths = await self._bucket.file_paths()  # before the blobs, which are written first
            blobs = await self._bucket.blobs()
            new = await self._read(path for name, path in paths.items() if name not in files_before)
            await self.threads.in_order(
                self._learn, blobs_before - blobs.keys(), files_before - paths.keys(), blobs, new
            )
            await self._bucket.erase([file for file in new if file.digest not in blobs], [])
            self._looked = time.monotonic()

    def _known(self) -> tuple[set[str], set[str]]:
        return self._shared.file_ids(), set(self._shared.blobs())

    def _learn(
        self, lost: set[str], deleted: set[str], blobs: dict[str, Stored], new: list[File]
    ) -> None:
        self._shared.forget(lost, erase=False)
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

        found = await _all(read(path) for path in paths)
        return [file for file in found if file is not None]

    def _note(self, file: File, reserved: int = 0) -> None:
        self._shared.add(file.digest, file.nbytes)
        self._shared.add_file(file)
        self._shared.touch(file.digest)
        self._shared.reserve(-reserved)

    @asynccontextmanager
    async def _alone(self, digest: str) -> AsyncIterator[None]:
        """One task at a time moves a blob."""
        lock = self._moving.setdefault(digest, asyncio.Lock())
        async with lock:
            yield


async def _all(work: Iterable[Coroutine[Any, Any, _Result]]) -> list[_Result]:
    """The results of all work, which ends where the first one fails."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
