"""Writing a streamed response body straight to the connection."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from uvicorn.protocols.http.flow_control import FlowControl


class BodyWriter:
    """Writes pieces of a response body; `scope["extensions"]` has it under `EXTENSION`.

    It stands for ASGI's `send` between the start and the end of a response without a length,
    because the sending coroutines of all the layers above the server are too much for each token.
    Clients of HTTP/1.0 do not know chunks; for them the response ends with the connection.
    """

    EXTENSION = "ep_serve.body_writer"
    __slots__ = ("_chunked", "_flow", "_transport")

    def __init__(self, transport: asyncio.Transport, flow: FlowControl, *, chunked: bool) -> None:
        self._transport = transport
        self._flow = flow
        self._chunked = chunked

    @property
    def paused(self) -> bool:
        """Whether the client reads too slowly; `drain` waits for it."""
        return self._flow.write_paused and not self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            framed = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data
            self._transport.write(framed)

    async def drain(self) -> None:
        await self._flow.drain()

    def abort(self) -> None:
        """Cut the connection, without waiting for a client that does not read."""
        self._transport.abort()
