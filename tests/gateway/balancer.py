"""A small balancer: each connection goes to a gateway that says it is ready."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import suppress

import httpx

POLL_S = 0.1
ASK_S = 10.0
"""A gateway that is slow to answer is busy, not gone."""


class Balancer:
    """Forwards bytes; knows nothing of HTTP but `/ready`, as a Kubernetes Service does."""

    def __init__(self) -> None:
        self.port = 0
        self._ready: dict[int, bool] = {}
        self._turn = itertools.count()
        self._server: asyncio.Server | None = None
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._client = httpx.AsyncClient(timeout=ASK_S)

    async def __aenter__(self) -> Balancer:
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0, backlog=1_024)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for port in list(self._asking):
            self.remove(port)
        await self._client.aclose()

    async def add(self, port: int) -> None:
        """Send connections to a gateway from now on, and return when it is ready for them."""
        self._ready[port] = False
        self._asking[port] = asyncio.create_task(self._ask(port))
        while not self._ready[port]:
            await asyncio.sleep(POLL_S)

    def remove(self, port: int) -> None:
        """Forget a gateway that has ended."""
        del self._ready[port]
        self._asking.pop(port).cancel()

    def _in_turn(self) -> list[int]:
        ready = [port for port, is_ready in self._ready.items() if is_ready]
        first = next(self._turn) % max(1, len(ready))
        return ready[first:] + ready[:first]

    async def _ask(self, port: int) -> None:
        while True:
            with suppress(httpx.TimeoutException):
                try:
                    answer = await self._client.get(f"http://127.0.0.1:{port}/ready")
                    self._ready[port] = answer.status_code == 200
                except httpx.TransportError:
                    self._ready[port] = False
            await asyncio.sleep(POLL_S)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for port in self._in_turn():
            with suppress(OSError):  # it has just ended, and nothing was sent: the next one
                back_reader, back_writer = await asyncio.open_connection("127.0.0.1", port)
                break
        else:
            writer.transport.abort()
            return
        await asyncio.gather(_copy(reader, back_writer), _copy(back_reader, writer))


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    writer.close()
