"""Reading a request body, inside limits of size, time and memory."""

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

    Keep = Callable[[InlinedMedium], Awaitable[object]]

_DENSE = 4_000
"""Strings and brackets in a piece of a body, from which on reading it takes milliseconds."""
_KEPT = 64 * 2**10
"""Bytes of a medium that stay in memory until the request is checked."""
_LONG = 64 * 2**10
"""Bytes of text, from which on parsing takes milliseconds."""


class BodyQuota:
    """The memory that request bodies take in this process, all together and by tenant."""

    def __init__(self, settings: RequestSettings) -> None:
        self._max_bytes = settings.max_buffered_bytes
        self._max_tenant_bytes = int(self._max_bytes * settings.max_buffered_share)
        self.used_bytes = 0
        self._by_tenant: Counter[str] = Counter()

    @contextmanager
    def reserve(self, tenant: str) -> Iterator[Reservation]:
        """Memory for one body, given back at the end of the block."""
        reservation = Reservation(self, tenant)
        try:
            yield reservation
        finally:
            reservation.resize(0)

    def add(self, tenant: str, nbytes: int) -> None:
        """Count more bytes, or fewer if negative.

        Raises:
            ApiError: 429.
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
    """The memory that one body takes."""

    def __init__(self, quota: BodyQuota, tenant: str) -> None:
        self.nbytes = 0
        self.tenant = tenant
        self._quota = quota

    def grow(self, nbytes: int) -> None:
        """Count more bytes.

        Raises:
            ApiError: 429.
        """
        self.resize(self.nbytes + nbytes)

    def resize(self, nbytes: int) -> None:
        """Count this many bytes from now on.

        Raises:
            ApiError: 429.
        """
        self._quota.add(self.tenant, nbytes - self.nbytes)
        self.nbytes = nbytes


class BodyReader:
    """Reads JSON bodies. Costly ones take turns, so that the event loop is not held up for long."""

    def __init__(self, settings: RequestSettings, max_media: int) -> None:
        self.quota = BodyQuota(settings)
        self._settings = settings
        self._max_media = max_media
        self._turns = FairSlots(1)

    async def json(self, request: Request, reserved: Reservation, keep: Keep) -> JsonBody:
        """The body of a request, complete and not parsed.

        Args:
            request: whose body is read.
            reserved: counts the memory that the body takes.
            keep: takes what is decoded of a medium out of memory.

        Raises:
            ApiError: 400, 408, 413, 415, 429 or 503.
        """
        check_type(request, "application/json")
        body = JsonBody(self._settings.max_text_bytes)
        chunks = stream(request, self._settings.max_body_bytes, self._settings)
        async with aclosing(chunks):
            async for chunk in chunks:
                reserved.grow(len(chunk))
                dense = chunk.count(b'"') + chunk.count(b"[") + chunk.count(b"]") > _DENSE
                async with self._turn(reserved.tenant) if dense else nullcontext():
                    body.feed(chunk)
                if len(body.media) > self._max_media:
                    raise too_many_media(self._max_media, len(body.media))
                for medium in body.all_media:
                    if medium.memory_bytes > _KEPT:
                        await keep(medium)
                reserved.resize(body.memory_bytes)
        return body

    @asynccontextmanager
    async def parsing(self, body: JsonBody, reserved: Reservation) -> AsyncIterator[None]:
        """Where a body is parsed and checked.

        Raises:
            ApiError: 429.
        """
        long = body.text_bytes > _LONG
        async with self._turn(reserved.tenant) if long else nullcontext():
            reserved.resize(body.parsed_bytes)
            yield

    @asynccontextmanager
    async def _turn(self, tenant: str) -> AsyncIterator[None]:
        """One after the other, with as much time between for everything else as each takes."""
        async with self._turns.slot(tenant):
            since = time.perf_counter()
            yield
            await asyncio.sleep(time.perf_counter() - since)


def check_type(request: Request, wanted: str) -> None:
    """415 unless the body has the wanted type and is not compressed."""
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
    """The chunks of a body.

    A client may pause for `body_timeout_s`. Time that it waits beyond what its bytes take at
    `min_body_rate` counts as a pause; time that the reader takes does not.

    Raises:
        ApiError: 413 if there are too many bytes, 408 if they come too slowly.
    """
    stated = request.headers.get("content-length", "0")
    received = 0
    if stated.isdecimal() and int(stated[:20]) > max_bytes:
        raise _too_large(max_bytes)
    loop = asyncio.get_running_loop()
    patience = settings.body_timeout_s
    more = True
    while more:
        since = loop.time()
        try:
            async with asyncio.timeout(patience):
                message = await request.receive()
        except TimeoutError:
            raise ApiError(408, "The body did not arrive in time.", code="body_timeout") from None
        if message["type"] == "http.disconnect":
            raise ApiError(400, "The client went away.", code="disconnected")
        chunk: bytes = message.get("body", b"")
        more = message.get("more_body", False)
        received += len(chunk)
        if received > max_bytes:
            raise _too_large(max_bytes)
        patience += len(chunk) / settings.min_body_rate - (loop.time() - since)
        patience = min(patience, settings.body_timeout_s)
        if chunk:
            yield chunk


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"A body may have {limit} bytes.", code="body_too_large")


def _overloaded(message: str) -> ApiError:
    return ApiError(429, message, code="overloaded", retry_after=2)
