"""Read request bodies with limits on size, time and memory."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import aclosing, asynccontextmanager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from ep_serve.gateway.body.json_body import JsonBody
from ep_serve.gateway.errors import ApiError, too_many_media
from ep_serve.gateway.slots import FairSlots

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Iterator,
    )

    from starlette.requests import Request

    from ep_serve.gateway.media.inlined import InlinedMedium
    from ep_serve.gateway.settings import RequestSettings

    Spool = Callable[[InlinedMedium], Awaitable[object]]

_DENSE = 4_000
"""Strings and brackets in a chunk from which on parsing it takes milliseconds."""
_MAX_IN_MEMORY = 64 * 2**10
"""Bytes of a medium that stay in memory until the request is validated."""
_LARGE_TEXT = 64 * 2**10
"""Bytes of text from which on parsing takes milliseconds."""


class BodyQuota:
    """Limits the memory of request bodies, in total and per tenant."""

    def __init__(self, settings: RequestSettings) -> None:
        self._max_bytes = settings.max_buffered_bytes
        self._max_tenant_bytes = int(self._max_bytes * settings.max_buffered_share)
        self.used_bytes = 0
        self._by_tenant: Counter[str] = Counter()

    @contextmanager
    def reserve(self, tenant: str) -> Iterator[Reservation]:
        """Reserve memory for one body inside the block."""
        reservation = Reservation(self, tenant)
        try:
            yield reservation
        finally:
            reservation.resize(0)

    def add(self, tenant: str, nbytes: int) -> None:
        """Count more bytes, or fewer if negative.

        Raises:
            ApiError: 429 above a limit.
        """
        if nbytes > 0:
            if self.used_bytes + nbytes > self._max_bytes:
                raise _overloaded("Too many large requests at once.")
            if self._by_tenant[tenant] + nbytes > self._max_tenant_bytes:
                raise _overloaded("Too many large requests of this client at once.")
        self.used_bytes += nbytes
        self._by_tenant[tenant] += nbytes
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]


class Reservation:
    """The memory reserved for one body."""

    def __init__(self, quota: BodyQuota, tenant: str) -> None:
        self.nbytes = 0
        self.tenant = tenant
        self._quota = quota

    def grow(self, nbytes: int) -> None:
        """Reserve more bytes.

        Raises:
            ApiError: 429 above a limit.
        """
        self.resize(self.nbytes + nbytes)

    def resize(self, nbytes: int) -> None:
        """Set the reserved bytes.

        Raises:
            ApiError: 429 above a limit.
        """
        self._quota.add(self.tenant, nbytes - self.nbytes)
        self.nbytes = nbytes


class BodyReader:
    """Reads JSON bodies. Expensive ones take turns, so that they do not block the event loop."""

    def __init__(self, settings: RequestSettings, max_media: int) -> None:
        self.quota = BodyQuota(settings)
        self._settings = settings
        self._max_media = max_media
        self._turns = FairSlots(1)

    async def json(self, request: Request, reserved: Reservation, spool: Spool) -> JsonBody:
        """Read the complete body of a request without parsing it.

        Args:
            request: the request.
            reserved: reservation for the memory of the body.
            spool: moves decoded content of a medium from memory to disk.

        Raises:
            ApiError: 400, 408, 413, 415, 429 or 503.
        """
        check_content_type(request, "application/json")
        body = JsonBody(self._settings.max_text_bytes)
        chunks = stream(request, self._settings.max_body_bytes, self._settings)
        async with aclosing(chunks):
            async for chunk in chunks:
                reserved.grow(len(chunk))
                is_dense = chunk.count(b'"') + chunk.count(b"[") + chunk.count(b"]") > _DENSE
                async with self._turn(reserved.tenant) if is_dense else nullcontext():
                    body.feed(chunk)
                if len(body.media) > self._max_media:
                    raise too_many_media(self._max_media, len(body.media))
                for medium in body.all_media:
                    if medium.memory_bytes > _MAX_IN_MEMORY:
                        await spool(medium)
                reserved.resize(body.memory_bytes)
        return body

    @asynccontextmanager
    async def parsing(self, body: JsonBody, reserved: Reservation) -> AsyncIterator[None]:
        """Reserve memory, and a turn if the body is large, for parsing and validation.

        Raises:
            ApiError: 429 above a memory limit.
        """
        is_large = body.text_bytes > _LARGE_TEXT
        async with self._turn(reserved.tenant) if is_large else nullcontext():
            reserved.resize(body.parsed_bytes)
            yield

    @asynccontextmanager
    async def _turn(self, tenant: str) -> AsyncIterator[None]:
        """Run one expensive block at a time, and pause as long as each takes for other work."""
        async with self._turns.slot(tenant):
            since = time.perf_counter()
            yield
            await asyncio.sleep(time.perf_counter() - since)


def check_content_type(request: Request, wanted: str) -> None:
    """Raise 415 unless the body has this content type and is not compressed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != wanted:
        raise ApiError(415, f"The content type must be {wanted}.", code="unsupported_content_type")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise ApiError(
            415, "Compressed bodies are not accepted.", code="unsupported_content_encoding"
        )


async def stream(
    request: Request, max_bytes: int, settings: RequestSettings
) -> AsyncGenerator[bytes]:
    """Yield the chunks of a body.

    A client may pause for `body_timeout_s`. Time beyond what its bytes take at `min_body_rate`
    counts as a pause; time of the reader does not.

    Raises:
        ApiError: 413 for too many bytes, 408 if they arrive too slowly.
    """
    stated = request.headers.get("content-length", "0")
    received = 0
    if stated.isdecimal() and int(stated[:20]) > max_bytes:
        raise _too_large(max_bytes)
    loop = asyncio.get_running_loop()
    budget_s = settings.body_timeout_s
    more = True
    while more:
        since = loop.time()
        try:
            async with asyncio.timeout(budget_s):
                message = await request.receive()
        except TimeoutError:
            raise ApiError(408, "The body did not arrive in time.", code="body_timeout") from None
        if message["type"] == "http.disconnect":
            raise ApiError(400, "The client disconnected.", code="disconnected")
        chunk: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        received += len(chunk)
        if received > max_bytes:
            raise _too_large(max_bytes)
        budget_s += len(chunk) / settings.min_body_rate - (loop.time() - since)
        budget_s = min(budget_s, settings.body_timeout_s)
        if chunk:
            yield chunk


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"A body may have at most {limit} bytes.", code="body_too_large")


def _overloaded(message: str) -> ApiError:
    return ApiError(429, message, code="overloaded", retry_after=2)
