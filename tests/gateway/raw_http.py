"""HTTP by hand, for requests that no client library would send."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tests.gateway.conftest import bearer
from tests.gateway.mock_upstream import MODEL

PATIENCE_S = 20.0
AUTH = f"Authorization: {bearer('a')['authorization']}\r\n".encode()
GET = b"GET /health HTTP/1.1\r\nHost: a\r\n"
HEALTH = GET + b"\r\n"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"


def body(*, stream: bool = False) -> bytes:
    """A chat request that the mock engine answers."""
    message = {"role": "user", "content": "Hello"}
    return json.dumps({"model": MODEL, "messages": [message], "stream": stream}).encode()


def with_length(content: bytes) -> bytes:
    """The end of a head, and a body."""
    return b"Content-Length: %d\r\n\r\n%b" % (len(content), content)


def chunk(content: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(content), extension, content)


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Send; nothing happens if the server has closed the connection."""
        with suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def until(self, text: bytes) -> bytes:
        """What arrives, until and with a text."""
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readuntil(text)

    async def rest(self) -> bytes:
        """All that arrives until the server closes the connection."""
        received = b""
        with suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE_S):
                while data := await self.reader.read(65_536):
                    received += data
        return received


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def answers(port: int, data: bytes) -> bytes:
    """What a server says to some bytes until it closes the connection."""
    async with connected(port) as client:
        await client.send(data)
        return await client.rest()


def statuses(received: bytes) -> list[int]:
    """Of all responses, if no body looks like one."""
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]
