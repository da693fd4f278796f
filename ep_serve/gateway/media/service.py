"""The media of one request: received, stored, probed, and lent to the engine."""

from __future__ import annotations

import hashlib
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ep_serve.contract.media_formats import CONTAINERS
from ep_serve.gateway.errors import ApiError, too_many_media
from ep_serve.gateway.media.fetch.fetcher import Fetcher, too_large
from ep_serve.gateway.media.inlined import InlinedMedium
from ep_serve.gateway.media.lending import Lender
from ep_serve.gateway.media.parts import Inline, MediaPart, Modality, Remote, Uploaded
from ep_serve.gateway.media.probe.processes import Prober
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
"""Cost of a second of video or sound, where a short text costs 1."""


@dataclass(slots=True)
class Lent:
    """The media of a request that an engine may fetch."""

    affinity: str = ""
    work: float = 0.0
    digests: dict[str, str] = field(default_factory=dict)
    """Those of the media, by their URLs."""


class MediaService:
    """Everything that happens to media."""

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
        self.prober = Prober(settings.media.probe, metrics)
        self.lender = Lender(settings.request.body_timeout_s)

    async def open(self) -> None:
        await self.store.open()
        await self.fetcher.open()

    async def close(self) -> None:
        await self.fetcher.close()
        await self.prober.close()
        await self.store.close()

    @asynccontextmanager
    async def lent(self, parts: Sequence[MediaPart], key: Key, share: str) -> AsyncIterator[Lent]:
        """Rewrite the parts of a request to URLs that work inside the block.

        Args:
            parts: what is rewritten.
            key: whose files may be named, and whose limits count.
            share: whose share of room and slots the request takes.

        Raises:
            ApiError: a medium is refused, with the limit named.
        """
        if len(parts) > self._settings.max_per_request:
            raise too_many_media(self._settings.max_per_request, len(parts))
        lent = Lent()
        total = 0
        async with AsyncExitStack() as stack:
            for part in parts:
                blob, facts = await self._medium(part, key, share, stack)
                total += blob.nbytes
                if total > self._settings.max_request_bytes:
                    raise too_large(self._settings.max_request_bytes)
                modality = part.modality or _natural(facts)
                _check(modality, facts, part.where)
                url = stack.enter_context(self.lender.lent(self.store.path(blob.digest)))
                name = cache_id(key.owner, modality, blob.digest)
                part.rewrite(modality, url, name)
                lent.digests[url] = blob.digest
                lent.affinity = lent.affinity or name
                lent.work += WORK_PER_SECOND * max(1.0, float(facts["duration_s"]))
            yield lent

    async def add_file(self, upload: Upload, key: Key, name: str, purpose: str) -> File:
        """Keep a complete upload as a file, if it is a medium that is served."""
        blob, _ = await self._accepted(upload)
        return await self.store.add_file(key.owner, blob, name, purpose)

    async def receive(self, upload: Upload, data: bytes, key: Key, source: str) -> None:
        """Add bytes to an upload, inside all limits."""
        if upload.nbytes + len(data) > self._settings.max_bytes:
            raise too_large(self._settings.max_bytes)
        await self._limits.media(key, len(data))
        await upload.write(data)
        self._metrics.media_bytes.labels(source).inc(len(data))

    async def keep(
        self, medium: InlinedMedium, key: Key, share: str, stack: AsyncExitStack
    ) -> Upload:
        """Move what is decoded of a medium from memory into an upload that ends with `stack`."""
        upload = medium.upload
        if upload is None:
            upload = medium.upload = await stack.enter_async_context(self.store.receive(share))
        pieces, medium.pieces = medium.pieces, []
        for piece in pieces:
            await self.receive(upload, piece, key, "inline")
        return upload

    async def _medium(
        self, part: MediaPart, key: Key, share: str, stack: AsyncExitStack
    ) -> tuple[Blob, dict[str, Any]]:
        """A part's medium, which stays until the end of `stack`, and the facts about it."""
        source = part.source
        if isinstance(source, Uploaded):
            file = await self.store.file(key.owner, source.file_id)
            await stack.enter_async_context(self.store.pinned(file.digest, share))
            blob = Blob(file.digest, file.nbytes)
            return blob, await self._facts(blob, share)
        if isinstance(source, Inline):
            return await self._accepted(await self.keep(source.medium, key, share, stack))
        upload = await stack.enter_async_context(self.store.receive(share))
        async with self._fetching.slot(share):
            await self._fetch(source, upload, key)
        return await self._accepted(upload)

    async def _accepted(self, upload: Upload) -> tuple[Blob, dict[str, Any]]:
        """A complete upload and the facts about it; if it is refused, nothing of it stays."""
        upload.refused = True
        blob = await upload.commit()
        facts = await self._facts(blob, upload.tenant)
        upload.refused = False
        return blob, facts

    async def _facts(self, blob: Blob, share: str) -> dict[str, Any]:
        """The facts about a medium that is in use, remembered or found."""
        facts = await self.store.facts(blob.digest)
        if facts is None:
            async with self._tracing.span("probe", bytes=blob.nbytes):
                facts = await self.prober.probe(self.store.path(blob.digest), share)
            await self.store.remember_facts(blob.digest, facts)
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
    from ep_serve.gateway.media.store.shared import SharedStore  # its library takes time to load

    return SharedStore(settings, settings.s3, metrics)


def cache_id(tenant: str, modality: Modality, digest: str) -> str:
    """The name under which engines remember a medium, one for each tenant.

    It is not secret: clients cannot choose the ids that engines are told.
    """
    return hashlib.sha256(f"ep-serve|{tenant}|{modality}|{digest}".encode()).hexdigest()


def _natural(facts: dict[str, Any]) -> Modality:
    if facts["picture"]:
        return "image"
    return "video" if facts["video"] else "audio"


def _check(modality: Modality, facts: dict[str, Any], where: str) -> None:
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
