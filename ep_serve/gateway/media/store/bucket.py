"""Access to an S3 bucket with `blobs/` by SHA-256 and a JSON object for each file.

`files/<digest of the tenant>/<id of the file>` holds the metadata of a file. It is immutable and
written after its blob, so that a listed file is always readable. There is no other state: a gateway
with an empty disk finds all files.
"""

from __future__ import annotations

import hashlib
import logging
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import obstore
import pydantic_core
from obstore.exceptions import BaseError
from obstore.store import S3Store

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.store.index import File

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence
    from pathlib import Path

    from obstore.store import S3Config

    from ep_serve.gateway.settings import S3Settings

logger = logging.getLogger(__name__)

_RETRIES = 3
_WHOLE = timedelta(minutes=10)
"""Request timeout, for the largest medium over a slow connection."""
_CHUNK = 1 << 20
_PAGE = 1_000
"""Page size of S3 listings."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A blob in the bucket; `written` is a Unix time."""

    nbytes: int
    written: float


class Bucket:
    """A bucket of an S3-compatible server.

    All methods raise `ApiError` 503 if the bucket fails.
    """

    def __init__(self, settings: S3Settings) -> None:
        seconds = timedelta(seconds=settings.timeout_s)
        plain = settings.endpoint is not None and settings.endpoint.scheme == "http"
        self._store = S3Store(
            settings.bucket,
            prefix=settings.prefix or None,
            config=_config(settings),
            client_options={
                "allow_http": plain,
                "connect_timeout": seconds,
                "read_timeout": seconds,
                "timeout": _WHOLE,
            },
            retry_config={"max_retries": _RETRIES, "retry_timeout": seconds},
        )

    # -- blobs ---------------------------------------------------------------------------------

    async def has(self, digest: str) -> bool:
        """Return whether a blob exists."""
        with _translated_errors("head"):
            try:
                await obstore.head_async(self._store, _blob(digest))
            except FileNotFoundError:
                return False
            return True

    async def put(self, digest: str, path: Path) -> None:
        """Upload a file as a blob, atomically."""
        with _translated_errors("put"):
            await obstore.put_async(self._store, _blob(digest), path)

    async def chunks(self, digest: str) -> AsyncGenerator[bytes]:
        """Yield the content of a blob, nothing if it does not exist."""
        with _translated_errors("get"):
            try:
                answer = await obstore.get_async(self._store, _blob(digest))
            except FileNotFoundError:
                return
            async for chunk in answer.stream(_CHUNK):
                yield bytes(chunk)

    async def blobs(self) -> dict[str, Stored]:
        """List all blobs by digest."""
        found = {}
        with _translated_errors("list"):
            async for page in obstore.list(self._store, "blobs", chunk_size=_PAGE):
                for item in page:
                    digest = item["path"].rpartition("/")[2]
                    found[digest] = Stored(item["size"], item["last_modified"].timestamp())
        return found

    # -- files ---------------------------------------------------------------------------------

    async def put_file(self, file: File) -> None:
        """Write the metadata of a file whose blob exists."""
        with _translated_errors("put"):
            await obstore.put_async(
                self._store, _file(file.tenant, file.id), pydantic_core.to_json(asdict(file))
            )

    async def file(self, tenant: str, file_id: str) -> File | None:
        """Read the metadata of a tenant's file."""
        return await self._read(_file(tenant, file_id))

    async def file_paths(self) -> dict[str, str]:
        """List the object paths of all files by id."""
        found: dict[str, str] = {}
        with _translated_errors("list"):
            async for page in obstore.list(self._store, "files", chunk_size=_PAGE):
                found |= {item["path"].rpartition("/")[2]: item["path"] for item in page}
        return found

    async def file_ids(self, tenant: str, after: str | None, limit: int) -> list[str]:
        """List up to `limit` file ids of a tenant in alphabetical order, after one."""
        found: list[str] = []
        folder = _folder(tenant)
        offset = f"{folder}/{after}" if after else None
        with _translated_errors("list"):
            pages = obstore.list(self._store, folder, offset=offset, chunk_size=min(limit, _PAGE))
            async for page in pages:
                found += (item["path"].rpartition("/")[2] for item in page)
                if len(found) >= limit:
                    break
        return sorted(found)[:limit]

    async def read(self, path: str) -> File | None:
        """Read one of `file_paths`; None if it is missing or invalid."""
        return await self._read(path)

    async def delete(self, files: Sequence[File], blobs: Sequence[str]) -> None:
        """Delete files, then blobs; missing ones are ignored."""
        for paths in ([_file(file.tenant, file.id) for file in files], [_blob(b) for b in blobs]):
            if paths:
                with _translated_errors("delete"):
                    await obstore.delete_async(self._store, paths)

    async def _read(self, path: str) -> File | None:
        with _translated_errors("get"):
            try:
                answer = await obstore.get_async(self._store, path)
                content = await answer.bytes_async()
            except FileNotFoundError:
                return None
        try:
            return File(**pydantic_core.from_json(bytes(content)))
        except (TypeError, ValueError):
            logger.warning("an object in the bucket has invalid metadata")
            return None


def _config(settings: S3Settings) -> S3Config:
    # Only Amazon S3 has a host name for each bucket.
    amazon = settings.endpoint is None
    config: S3Config = {"region": settings.region, "virtual_hosted_style_request": amazon}
    if settings.endpoint is not None:
        config["endpoint"] = str(settings.endpoint).rstrip("/")
    if settings.access_key_id is not None and settings.secret_access_key is not None:
        config["access_key_id"] = settings.access_key_id.get_secret_value()
        config["secret_access_key"] = settings.secret_access_key.get_secret_value()
    return config


def _blob(digest: str) -> str:
    return f"blobs/{digest[:2]}/{digest}"


def _file(tenant: str, file_id: str) -> str:
    return f"{_folder(tenant)}/{file_id}"


def _folder(tenant: str) -> str:
    # A tenant's name may contain characters that are special in object names.
    return f"files/{hashlib.sha256(tenant.encode()).hexdigest()[:32]}"


@contextmanager
def _translated_errors(what: str) -> Iterator[None]:
    """Log errors without object names and convert them to `ApiError` 503."""
    try:
        yield
    except (BaseError, OSError) as error:
        logger.error("the bucket failed", extra={"operation": what, "kind": type(error).__name__})
        raise ApiError(
            503, "The media storage is unavailable.", code="storage_unavailable", retry_after=5
        ) from error
