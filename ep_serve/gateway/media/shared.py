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
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.bucket import Bucket
from ep_serve.gateway.media.index import Blob, File, Gone, Index, new_file
from ep_serve.gateway.media.store import Store, not_found
from ep_serve.gateway.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable
    from pathlib import Path

    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import S3Settings, StoreSettings

logger = logging.getLogger(__name__)

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
        self._shared = Index(s3.quota_bytes, metrics.bucket_bytes.set)
        self._interval = s3.sync_interval_s
        self._looked = 0.0
        self._looking = asyncio.Lock()
        self._readers = asyncio.Semaphore(_READERS)
        self._moving: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def open(self) -> None:
        """Take the folder over, and learn what is in the bucket.

        Raises:
            SettingsError: the folder or the bucket cannot be used.
        """
        await super().open()
        self._shared.open(None)
        try:
            await self._look()
        except ApiError as error:
            await self.close()
            reason = str(error.__cause__).splitlines()[0][:300]
            raise SettingsError(
                f"store.s3: the bucket {self._where} cannot be used ({reason})"
            ) from None

    async def close(self) -> None:
        self._shared.close()
        await super().close()

    @asynccontextmanager
    async def pinned(self, digest: str) -> AsyncIterator[Path]:
        """The path of a medium on disk, copied there if only the bucket has it."""
        with self._index.pinned(digest):
            if not self._path(digest).is_file():
                await self._copy(digest)
            async with super().pinned(digest) as path:
                yield path

    async def sweep(self) -> None:
        """Remove what is too old, here and in the bucket."""
        await super().sweep()
        if self._looked and time.monotonic() >= self._looked + self._interval:
            await self._look()
            await self._erase(self._shared.sweep(ORPHAN_S))

    # -- files ---------------------------------------------------------------------------------

    async def add_file(self, tenant: str, blob: Blob, name: str, purpose: str) -> File:
        """Put a medium into the bucket and give it a name; it is pinned on disk."""
        file = new_file(tenant, blob, name, purpose, self._settings.file_ttl_s)
        async with self._alone(blob.digest):
            with self._shared.pinned(blob.digest):
                # One without a name may be about to be removed by another gateway.
                if not (self._shared.named(blob.digest) and await self._bucket.has(blob.digest)):
                    await self._put(blob)
                await self._bucket.put_file(file)
                self._note(file)
        return file

    async def file(self, tenant: str, file_id: str) -> File:
        """A tenant's file, as the bucket knows it now."""
        found = None
        if _FILE_ID.fullmatch(file_id):
            found = await self._bucket.file(tenant, file_id)
        if found is None or found.tenant != tenant or found.expires < time.time():
            self._shared.remove_file(file_id)
            raise not_found()
        self._note(found)
        self._shared.touch(found.digest)
        return found

    async def files(self, tenant: str, after: str | None, limit: int) -> list[File]:
        """Up to `limit` files of a tenant, newest first, older than the file `after`."""
        if after and not _FILE_ID.fullmatch(after):
            raise not_found()
        ids = await self._bucket.file_ids(tenant, after, limit)

        async def known(file_id: str) -> File | None:
            async with self._readers:
                found = self._shared.file(tenant, file_id)
                return found or await self._bucket.file(tenant, file_id)

        found = await asyncio.gather(*(known(file_id) for file_id in ids))
        return [file for file in found if file is not None and file.expires >= time.time()]

    async def delete_file(self, tenant: str, file_id: str) -> None:
        """Forget a file, and its content if no gateway knows another name for it."""
        file = await self.file(tenant, file_id)
        await self._bucket.erase([file], [])
        self._shared.remove_file(file_id)
        await self._look()
        await self._erase(self._shared.release(file.digest))
        self.discard_unused(file.digest)

    # -- between disk and bucket ---------------------------------------------------------------

    async def _put(self, blob: Blob) -> None:
        if self._shared.lacks(blob.nbytes):
            await self._look()
        await self._erase(self._shared.make_room(blob.nbytes))
        try:
            await self._bucket.put(blob.digest, self._path(blob.digest))
            self._shared.add(blob.digest, blob.nbytes)
        finally:
            self._shared.count(-blob.nbytes)

    async def _copy(self, digest: str) -> None:
        """Bring a blob to disk, if it is in the bucket and what its name says."""
        async with self._alone(digest):
            if self._path(digest).is_file():
                return
            async with self.receive() as upload:
                async with aclosing(self._bucket.chunks(digest)) as chunks:
                    async for chunk in chunks:
                        await upload.write(chunk)
                if upload.nbytes and (await upload.commit()).digest != digest:
                    logger.error("a blob in the bucket is not what its name says")

    async def _erase(self, gone: Gone) -> None:
        await self._bucket.erase(gone.files, gone.blobs)
        self._metrics.store_evicted.inc(len(gone.blobs))

    # -- what others did -----------------------------------------------------------------------

    async def _look(self) -> None:
        """Bring the index up to date. What this gateway does meanwhile is left as it is."""
        async with self._looking:
            files_before, blobs_before = self._shared.file_ids(), set(self._shared.blobs())
            paths = await self._bucket.file_paths()  # before the blobs, which are written first
            blobs = await self._bucket.blobs()
            new = await self._read(path for name, path in paths.items() if name not in files_before)
            self._shared.forget(blobs_before - blobs.keys())
            for file_id in files_before - paths.keys():
                self._shared.remove_file(file_id)
            for digest, stored in blobs.items():
                self._shared.add(digest, stored.nbytes, stored.written)
            lost = [file for file in new if file.digest not in blobs]
            for file in new:
                if file.digest in blobs:
                    self._shared.add_file(file)
            await self._bucket.erase(lost, [])
            self._looked = time.monotonic()

    async def _read(self, paths: Iterable[str]) -> list[File]:
        async def read(path: str) -> File | None:
            async with self._readers:
                return await self._bucket.read(path)

        found = await asyncio.gather(*(read(path) for path in paths))
        return [file for file in found if file is not None]

    def _note(self, file: File) -> None:
        self._shared.add(file.digest, file.nbytes)
        self._shared.add_file(file)

    @asynccontextmanager
    async def _alone(self, digest: str) -> AsyncIterator[None]:
        """One task at a time moves a blob."""
        lock = self._moving.setdefault(digest, asyncio.Lock())
        async with lock:
            yield
