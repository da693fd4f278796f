"""Write a streamed response body directly to the transport."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uvicorn.protocols.http.flow_control import FlowControl


class BodyWriter:
    """Writes chunks of a response body; available as `scope["extensions"][EXTENSION]`.

    It replaces ASGI's `send` between the start and the end of a response without a length, because
    calling the `send` coroutines of all middleware layers is too slow for each token. HTTP/1.0 has
    no chunked encoding; there the response ends with the connection.
    """

    EXTENSION = "ep_serve.body_writer"
    __slots__ = ("_chunked", "_flow", "_transport")

    def __init__(self, transport: asyncio.Transport, flow: FlowControl, *, chunked: bool) -> None:
        self._transport = transport
        self._flow = flow
        self._chunked = chunked

    @property
    def paused(self) -> bool:
        """Whether the write buffer is above its high-water mark; `drain` waits for it."""
        return self._flow.write_paused and not self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            framed = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
            self._transport.write(framed)

    async def drain(self) -> None:
        await self._flow.drain()

    def abort(self) -> None:
        """Close the connection without sending what is buffered."""
        self._transport.abort()
