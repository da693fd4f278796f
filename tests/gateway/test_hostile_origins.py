"""Servers that media are fetched from, and that send everything but a medium."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.fetch.fetcher import Fetcher
from ep_serve.gateway.settings import MediaSettings
from tests.gateway.test_media import fetching

pytestmark = pytest.mark.anyio

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
MANY_HEADERS = b"".join(b"x%d: y\r\n" % number for number in range(1_000))
ENDLESS = {
    "interim answers": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 1_000),
    "large interim answers": (b"", b"HTTP/1.1 103 Early Hints\r\n%b\r\n" % MANY_HEADERS[:4_000]),
    "headers": (b"HTTP/1.1 200 OK\r\n", MANY_HEADERS),
    "empty lines": (b"", b"\r\n" * 10_000),
    "chunks of one byte": (CHUNKED, b"1\r\na\r\n" * 10_000),
    "chunks with long extensions": (CHUNKED, b"1;%b\r\na\r\n" % (b"a" * 1_000) * 10),
    "one extension": (CHUNKED + b"1;", b"a" * 10_000),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\n", MANY_HEADERS),
}
LIMIT = 16 * 2**20
"""Bytes that a server gets rid of at most, most of them into buffers of the system."""


@asynccontextmanager
async def origin(start: bytes, piece: bytes, count: int) -> AsyncIterator[tuple[int, list[int]]]:
    """A server that answers with a start and many pieces; its port, and how many it wrote."""
    written = [0]

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(start)
            for _ in range(count):
                writer.write(piece)
                written[0] += len(piece)
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], written


async def fetched(port: int) -> int:
    """Bytes of the content at a port."""
    received = 0

    async def write(data: bytes) -> None:
        nonlocal received
        received += len(data)

    fetcher = Fetcher(MediaSettings(**fetching(port)))
    await fetcher.open()
    try:
        await fetcher.fetch(f"http://127.0.0.1:{port}/", write)
    finally:
        await fetcher.close()
    return received


@pytest.mark.parametrize("name", list(ENDLESS))
async def test_a_server_that_sends_little_but_overhead_is_cut_off(name: str) -> None:
    start, piece = ENDLESS[name]
    async with origin(start, piece, 100 * 2**20 // len(piece)) as (port, written):
        with pytest.raises(ApiError) as refused:
            await fetched(port)
        assert refused.value.status == 422
        assert written[0] < LIMIT


@pytest.mark.parametrize("size", [100, 4_000, 100_000, 2**20])
async def test_a_medium_in_chunks_of_any_usual_size_is_fetched(size: int) -> None:
    chunk = b"%x\r\n%b\r\n" % (size, bytes(size))
    count = 8 * 2**20 // size
    async with origin(CHUNKED, chunk, count) as (port, _):
        with pytest.raises(ApiError) as cut:  # the last chunk is missing
            await fetched(port)
        assert cut.value.status == 422
    async with origin(b"HTTP/1.1 200 OK\r\n\r\n", bytes(size), count) as (port, _):
        assert await fetched(port) == size * count
