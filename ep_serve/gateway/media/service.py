"""Receive, store and probe the media of requests and publish them to engines."""

from __future__ import annotations

import hashlib
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ep_serve.contract.media_formats import CONTAINERS
from ep_serve.gateway.errors import ApiError, too_many_media
from ep_serve.gateway.media.fetch.fetcher import Fetcher, too_large
from ep_serve.gateway.media.inlined import InlinedMedium
from ep_serve.gateway.media.media_server import MediaServer
from ep_serve.gateway.media.parts import Inline, MediaPart, Modality, Remote, Uploaded
from ep_serve.gateway.media.probe.processes import MediaProber
from ep_serve.gateway.media.store.index import Blob, File
from ep_serve.gateway.media.store.local import Store
from ep_serve.gateway.slots import FairSlots

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from ep_serve.gateway.keys import Key
    from ep_serve.gateway.limits import KeyLimits
    from ep_serve.gateway.media.store.upload import Upload
    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import GatewaySettings, StoreSettings
    from ep_serve.gateway.tracing import Tracing

WORK_PER_SECOND = 0.1
"""Routing cost of a second of video or audio; a short text costs 1."""


@dataclass(slots=True)
class MediaLease:
    """The published media of a request."""

    affinity: str = ""
    work: float = 0.0
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 digests of the media by their URLs."""


class MediaService:
    """Stores, fetches, probes and publishes media."""

    def __init__(
        self, settings: GatewaySettings, limits: KeyLimits, metrics: Metrics, tracing: Tracing
    ) -> None:
        self._settings = settings.media
        self._limits = limits
        self._metrics = metrics
        self._tracing = tracing
        self._fetching = FairSlots(settings.media.concurrency)
        self.store = _store(settings.store, metrics)
        self.fetcher = Fetcher(settings.media)
        self.prober = MediaProber(settings.media.probe, metrics)
        self.server = MediaServer(settings.request.body_timeout_s)

    async def open(self) -> None:
        await self.store.open()
        await self.fetcher.open()

    async def close(self) -> None:
        await self.fetcher.close()
        await self.prober.close()
        await self.store.close()

    @asynccontextmanager
    async def lease(
        self, parts: Sequence[MediaPart], key: Key, tenant: str
    ) -> AsyncIterator[MediaLease]:
        """Rewrite the parts of a request to URLs that are valid inside the block.

        Args:
            parts: content parts, rewritten in place.
            key: key of the request.
            tenant: tenant whose quotas the request uses.

        Raises:
            ApiError: a medium is rejected.
        """
        if len(parts) > self._settings.max_per_request:
            raise too_many_media(self._settings.max_per_request, len(parts))
        lease = MediaLease()
        total = 0
        async with AsyncExitStack() as stack:
            for part in parts:
                blob, facts = await self._medium(part, key, tenant, stack)
                total += blob.nbytes
                if total > self._settings.max_request_bytes:
                    raise too_large(self._settings.max_request_bytes)
                modality = part.modality or _infer_modality(facts)
                _check_modality(modality, facts, part.where)
                url = stack.enter_context(self.server.publish(self.store.path(blob.digest)))
                name = cache_id(key.owner, modality, blob.digest)
                part.rewrite(modality, url, name)
                lease.digests[url] = blob.digest
                lease.affinity = lease.affinity or name
                lease.work += WORK_PER_SECOND * max(1.0, float(facts["duration_s"]))
            yield lease

    async def add_file(self, upload: Upload, key: Key, name: str, purpose: str) -> File:
        """Store a complete upload as a file, if it is a supported medium."""
        blob, _ = await self._accepted(upload)
        return await self.store.add_file(key.owner, blob, name, purpose)

    async def receive(self, upload: Upload, data: bytes, key: Key, source: str) -> None:
        """Append bytes to an upload and count them against all limits."""
        if upload.nbytes + len(data) > self._settings.max_bytes:
            raise too_large(self._settings.max_bytes)
        await self._limits.count_media(key, len(data))
        await upload.write(data)
        self._metrics.media_bytes.labels(source).inc(len(data))

    async def spool(
        self, medium: InlinedMedium, key: Key, tenant: str, stack: AsyncExitStack
    ) -> Upload:
        """Move decoded content from memory to an upload that ends with `stack`."""
        upload = medium.upload
        if upload is None:
            upload = medium.upload = await stack.enter_async_context(self.store.receive(tenant))
        pieces, medium.pieces = medium.pieces, []
        for piece in pieces:
            await self.receive(upload, piece, key, "inline")
        return upload

    async def _medium(
        self, part: MediaPart, key: Key, tenant: str, stack: AsyncExitStack
    ) -> tuple[Blob, dict[str, Any]]:
        """Return the medium of a part, pinned until the end of `stack`, and its properties."""
        source = part.source
        if isinstance(source, Uploaded):
            file = await self.store.file(key.owner, source.file_id)
            await stack.enter_async_context(self.store.pinned(file.digest, tenant))
            blob = Blob(file.digest, file.nbytes)
            return blob, await self._facts(blob, tenant)
        if isinstance(source, Inline):
            return await self._accepted(await self.spool(source.medium, key, tenant, stack))
        upload = await stack.enter_async_context(self.store.receive(tenant))
        async with self._fetching.slot(tenant):
            await self._fetch(source, upload, key)
        return await self._accepted(upload)

    async def _accepted(self, upload: Upload) -> tuple[Blob, dict[str, Any]]:
        """Commit and probe an upload; it is removed if it is rejected."""
        upload.refused = True
        blob = await upload.commit()
        facts = await self._facts(blob, upload.tenant)
        upload.refused = False
        return blob, facts

    async def _facts(self, blob: Blob, tenant: str) -> dict[str, Any]:
        """Return the stored properties of a pinned medium, or probe it."""
        facts = await self.store.facts(blob.digest)
        if facts is None:
            async with self._tracing.span("probe", bytes=blob.nbytes):
                facts = await self.prober.probe(self.store.path(blob.digest), tenant)
            await self.store.save_facts(blob.digest, facts)
        return facts

    async def _fetch(self, source: Remote, upload: Upload, key: Key) -> None:
        async with self._tracing.span("fetch") as span:

            async def write(chunk: bytes) -> None:
                await self.receive(upload, chunk, key, "fetched")

            await self.fetcher.fetch(source.url, write)
            span.set(bytes=upload.nbytes)


def _store(settings: StoreSettings, metrics: Metrics) -> Store:
    if settings.s3 is None:
        return Store(settings, metrics)
    from ep_serve.gateway.media.store.shared import SharedStore  # slow import

    return SharedStore(settings, settings.s3, metrics)


def cache_id(tenant: str, modality: Modality, digest: str) -> str:
    """Return the id of a medium in the caches of engines, different for each tenant.

    It need not be secret: clients cannot choose the ids that are sent to engines.
    """
    return hashlib.sha256(f"ep-serve|{tenant}|{modality}|{digest}".encode()).hexdigest()


def _infer_modality(facts: dict[str, Any]) -> Modality:
    if facts["picture"]:
        return "image"
    return "video" if facts["video"] else "audio"


def _check_modality(modality: Modality, facts: dict[str, Any], where: str) -> None:
    still = facts["container"] not in CONTAINERS
    fits = {
        "image": facts["picture"],
        "video": bool(facts["video"]) and not still,
        "audio": bool(facts["audio"]),
    }
    if not fits[modality]:
        article = "a" if modality == "video" else "an"
        raise ApiError(
            415, f"The medium is not {article} {modality}.", code="media_unsupported", param=where
        )
