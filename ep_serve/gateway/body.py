"""Reading a request body, inside limits of size, time and memory."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pydantic_core

from ep_serve.gateway.errors import ApiError, invalid

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.requests import Request

    from ep_serve.gateway.settings import RequestSettings

SLOWEST = 16 * 1024
"""Bytes a second below which a sender runs out of time."""


class Bodies:
    """The bodies that this process holds in memory."""

    def __init__(self, settings: RequestSettings) -> None:
        self._settings = settings
        self._held = 0

    @contextmanager
    def room(self) -> Iterator[Room]:
        """Room for one body, given back at the end of the block."""
        room = Room(self)
        try:
            yield room
        finally:
            self._held -= room.nbytes

    def take(self, nbytes: int) -> None:
        if self._held + nbytes > self._settings.max_buffered_bytes:
            raise ApiError(
                429, "Too many large requests at once.", code="overloaded", retry_after=2
            )
        self._held += nbytes

    async def json(self, request: Request, room: Room) -> dict[str, Any]:
        """The JSON object that a request carries.

        Raises:
            ApiError: 400, 408, 413, 415 or 429.
        """
        check_type(request, "application/json")
        data = bytearray()
        async for chunk in stream(request, self._settings.max_body_bytes, self._settings):
            room.grow(len(chunk))
            data += chunk
        try:
            body = pydantic_core.from_json(bytes(data), allow_inf_nan=False)
        except ValueError as error:
            raise invalid(f"The body is not valid JSON: {error}.", code="invalid_json") from None
        if not isinstance(body, dict):
            raise invalid("The body must be a JSON object.", code="invalid_json")
        return body


class Room:
    """What one body takes of the whole."""

    def __init__(self, bodies: Bodies) -> None:
        self.nbytes = 0
        self._bodies = bodies

    def grow(self, nbytes: int) -> None:
        self._bodies.take(nbytes)
        self.nbytes += nbytes


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
) -> AsyncIterator[bytes]:
    """The chunks of a body.

    Raises:
        ApiError: 413 if there are too many bytes, 408 if they come too slowly.
    """
    stated = request.headers.get("content-length", "0")
    received = 0
    if stated.isdecimal() and int(stated[:20]) > max_bytes:
        raise _too_large(max_bytes)
    loop = asyncio.get_running_loop()
    end = loop.time() + settings.body_timeout_s
    more = True
    while more:
        try:
            async with asyncio.timeout_at(end + received / SLOWEST):
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
        if chunk:
            yield chunk


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"A body may have {limit} bytes.", code="body_too_large")
