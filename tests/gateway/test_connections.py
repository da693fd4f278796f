"""Connections to engines, on the bytes that engines may send."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from yarl import URL

from ep_serve.gateway.upstream.connection import (
    HIGH_WATER,
    BrokenAnswerError,
    Connection,
    ConnectionPool,
    request_head,
)

pytestmark = pytest.mark.anyio

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]
OK = b"HTTP/1.1 200 OK\r\n"
HELLO = OK + b"Content-Length: 5\r\n\r\nhello"


@asynccontextmanager
async def engine(*answers: bytes, hang_up: bool = False) -> AsyncIterator[ConnectionPool]:
    """Connections to a server that answers so, one request after the other."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        if not hang_up:
            await reader.read()

    async with serving(handle) as connections:
        yield connections


@asynccontextmanager
async def serving(handle: Handler) -> AsyncIterator[ConnectionPool]:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await handle(reader, writer)
        writer.close()

    server = await asyncio.start_server(closing, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connections = ConnectionPool(URL(f"http://127.0.0.1:{port}"), None, 5)
    yield connections
    connections.close_idle(0)
    server.close()


async def asked(connections: ConnectionPool) -> Connection:
    connection = await connections.acquire()
    connection.send_request(request_head("/", {"host": "engine"}, 0), b"")
    return connection


async def whole(connection: Connection) -> bytes:
    await connection.read_head()
    found = b""
    while data := await connection.read():
        found += data
    return found


async def test_a_connection_is_used_again() -> None:
    async with engine(HELLO, HELLO) as connections:
        first = await asked(connections)
        assert await whole(first) == b"hello"
        assert (first.status, first.headers) == (200, {b"content-length": b"5"})
        connections.release(first)
        second = await asked(connections)
        assert second is first
        assert await whole(second) == b"hello"


@pytest.mark.parametrize(
    "answer",
    [
        HELLO + HELLO,
        HELLO + b"SSH-2.0-OpenSSH_9.6\r\n",
        OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    ],
)
async def test_a_connection_that_cannot_go_on_is_not_used_again(answer: bytes) -> None:
    async with engine(answer) as connections:
        connection = await asked(connections)
        assert await whole(connection) == b"hello"
        connections.release(connection)
        assert await connections.acquire() is not connection


async def test_a_connection_that_was_idle_for_long_is_not_used_again() -> None:
    async with engine(HELLO, HELLO) as connections:
        connection = await asked(connections)
        await whole(connection)
        connections.release(connection)
        connections.close_idle(0)
        assert await connections.acquire() is not connection


async def test_an_answer_that_was_not_read_to_its_end_closes_the_connection() -> None:
    hung_up = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"Content-Length: 500\r\n\r\nhello")
        with suppress(ConnectionError):
            await reader.read()
        hung_up.set()

    async with serving(handle) as connections:
        connection = await asked(connections)
        await connection.read_head()
        connections.release(connection)
        await asyncio.wait_for(hung_up.wait(), 10)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 100 Continue\r\n\r\n" + HELLO,
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    ],
)
async def test_every_framing_of_a_body_is_understood(answer: bytes) -> None:
    async with engine(answer) as connections:
        assert await whole(await asked(connections)) == b"hello"


async def test_trailers_do_not_become_headers() -> None:
    answer = OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Late: 1\r\n\r\n"
    async with engine(answer) as connections:
        connection = await asked(connections)
        await connection.read_head()
        while await connection.read():
            pass
        assert b"x-late" not in connection.headers


async def test_a_body_without_a_length_ends_with_its_connection() -> None:
    async with engine(OK + b"\r\nhello", hang_up=True) as connections:
        connection = await asked(connections)
        assert await whole(connection) == b"hello"
        assert not connection.reusable


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 20",
        OK + b"Content-Length: 50\r\n\r\nhello",
        OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        OK + b"x-long: " + b"x" * 70_000,
    ],
)
async def test_an_answer_that_breaks_off_or_is_none_is_an_error(answer: bytes) -> None:
    async with engine(answer, hang_up=True) as connections:
        connection = await asked(connections)
        with pytest.raises(BrokenAnswerError):
            await whole(connection)


async def test_pieces_are_delivered_as_they_arrive() -> None:
    pieces = [b"one", b"two", b"three"]
    arrived = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"Transfer-Encoding: chunked\r\n\r\n")
        for piece in pieces:
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await asyncio.wait_for(arrived.wait(), 10)
            arrived.clear()
        writer.write(b"0\r\n\r\n")

    found: list[tuple[bytes, bool]] = []

    def sink(data: bytes, last: bool) -> None:
        found.append((data, last))
        arrived.set()

    async with serving(handle) as connections:
        connection = await asked(connections)
        await connection.read_head()
        await connection.deliver(sink)
        assert found == [*((piece, False) for piece in pieces), (b"", True)]


async def test_an_error_of_the_receiver_ends_the_delivery() -> None:
    def sink(data: bytes, last: bool) -> None:
        raise ZeroDivisionError

    async with engine(HELLO) as connections:
        connection = await asked(connections)
        await connection.read_head()
        with pytest.raises(ZeroDivisionError):
            await connection.deliver(sink)
        assert not connection.reusable


@pytest.mark.parametrize("delivered", [False, True])
async def test_reading_from_an_engine_pauses_while_the_client_does_not_read(
    delivered: bool,
) -> None:
    sent = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK + b"\r\n")
        while True:
            writer.write(bytes(HIGH_WATER // 4))
            await writer.drain()
            sent += HIGH_WATER // 4

    async with serving(handle) as connections:
        connection = await asked(connections)
        await connection.read_head()
        if delivered:
            delivery = asyncio.create_task(
                connection.deliver(lambda data, last: connection.pause())
            )
        before = -1
        while sent != before:
            before = sent
            await asyncio.sleep(0.3)
        assert sent < 64 * HIGH_WATER  # what the kernel holds, too
        while sent == before:
            connection.resume() if delivered else await connection.read()
            await asyncio.sleep(0.01)
        connection.abort()
        if delivered:
            with pytest.raises(BrokenAnswerError):
                await delivery


async def test_an_engine_that_cannot_be_reached_is_an_os_error() -> None:
    async with engine() as connections:
        pass
    with pytest.raises(OSError, match="Connect call failed"):
        await connections.acquire()


def test_a_header_cannot_end_the_head() -> None:
    with pytest.raises(ValueError, match="line break"):
        request_head("/", {"authorization": "Bearer a\r\nx: y"}, 0)
