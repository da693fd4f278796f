"""HTTP/1.1 connections to an engine, made for streams of small pieces.

HTTP libraries hand a body over by waking a task for each piece. With hundreds of streams that is
most of what the gateway computes, so the pieces of a stream go from the parser (llhttp, the one
that reads the clients' requests too) to a function instead. Nothing else of HTTP is written here:
no redirects, no compression, no upgrades, one request at a time on a connection.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import httptools

if TYPE_CHECKING:
    from collections.abc import Mapping

    from yarl import URL

KEEPALIVE_S = 3.0
"""Idle connections are closed before vLLM's server does it (5 s), which a request could meet."""
MAX_HEAD = 64 * 2**10
SMALL = 64 * 2**10
"""Bodies up to this are copied behind their head: one write costs less than two."""
HIGH_WATER = 2**20
"""Bytes that wait to be read before the engine has to wait."""

_LOCAL_ERRORS = frozenset(
    {errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
)

Sink = Callable[[bytes, bool], None]
"""Takes a piece of a body, and whether it is the last one."""


class BrokenAnswerError(Exception):
    """An engine broke off, or does not speak HTTP."""


class Connection(asyncio.Protocol):
    """One connection. `ask`, then `head`, then `read` or `deliver`."""

    def __init__(self, owner: Connections) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._closed = self._aborted = self._paused = False
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self._parser: Any = httptools.HttpResponseParser(self)
        self._head_bytes = 0
        self._has_head = self._complete = self._keep_alive = False
        self._pieces: list[bytes] = []
        self._waiting_bytes = 0
        self._sink: Sink | None = None
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def reusable(self) -> bool:
        """Whether another request may follow."""
        intact = not (self._closed or self._aborted)
        return self._complete and self._keep_alive and intact

    def ask(self, head: bytes, body: bytes) -> None:
        """Send a request."""
        assert self._transport is not None
        self._reset()
        if len(body) <= SMALL:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    async def head(self) -> None:
        """Wait for `status` and `headers`.

        Raises:
            BrokenAnswerError: they never came.
        """
        while not self._has_head:
            await self._change()

    async def read(self) -> bytes:
        """More of the body; nothing at its end.

        Raises:
            BrokenAnswerError: the engine broke off.
        """
        while not self._pieces and not self._complete:
            await self._change()
        self.resume()
        return self._taken()

    async def deliver(self, sink: Sink) -> None:
        """Give what is left of the body to a function, each piece as it arrives.

        Raises:
            BrokenAnswerError: the engine broke off.
            Exception: what `sink` raised.
        """
        self._sink = sink
        self.resume()
        self._hand_over()
        while not self._complete or self._error is not None:
            await self._change()

    def pause(self) -> None:
        """Let the engine wait."""
        if self._transport is not None and not (self._closed or self._paused):
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and self._paused and not self._closed:
            self._paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Hang up; the engine stops working on the request."""
        self._aborted = True
        if self._transport is not None:
            self._transport.abort()

    async def _change(self) -> None:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise BrokenAnswerError("the connection was closed")
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
        if self._error is not None:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _taken(self) -> bytes:
        pieces, self._pieces, self._waiting_bytes = self._pieces, [], 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _hand_over(self) -> None:
        if self._sink is not None and (self._pieces or self._complete):
            try:
                self._sink(self._taken(), self._complete)
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._sink = None
        self.abort()
        self._wake()

    # -- what the transport calls --------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not subclasses

    def data_received(self, data: bytes) -> None:
        if not self._has_head:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._keep_alive = False
            if not self._complete:
                self._fail(BrokenAnswerError(str(error)))
        if not self._has_head and self._head_bytes > MAX_HEAD:
            self._fail(BrokenAnswerError("a head without end"))
        if self._sink is not None:
            self._hand_over()
        elif self._waiting_bytes > HIGH_WATER:
            self.pause()
        if self._sink is None or self._complete:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        # Without a length the end of the connection is the end of the body.
        ends_so = not self.headers.keys() & {b"content-length", b"transfer-encoding"}
        intact = exc is None and not self._aborted
        if self._has_head and ends_so and intact and not self._complete:
            self._complete = True
            self._hand_over()
        self._wake()

    # -- what the parser calls -----------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:  # an answer that nobody asked for
            self._keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._complete:
            self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status: int = self._parser.get_status_code()
        if status < 200:  # an interim answer
            self.headers = {}
        elif not self._complete:
            self.status, self._has_head = status, True

    def on_body(self, body: bytes) -> None:
        if not self._complete:
            if self.status == 200:
                self._owner.heard_at = self._loop.time()
            self._pieces.append(body)
            self._waiting_bytes += len(body)

    def on_message_complete(self) -> None:
        if self._has_head:
            self._keep_alive = not self._complete and self._parser.should_keep_alive()
            self._complete = True


class Connections:
    """The connections to one address, kept for the next request.

    `heard_at` is when a piece of an answer came last, in the time of the event loop. Refusals do
    not count, nor do heads: servers send both without the engine behind them.
    """

    def __init__(self, url: URL, server_hostname: str | None, connect_timeout_s: float) -> None:
        self._host = url.host or ""
        self._port = url.port or 0
        self._timeout_s = connect_timeout_s
        self.heard_at = float("-inf")
        self._tls: dict[str, Any] = {}
        if server_hostname is not None:
            self._tls = {"ssl": ssl.create_default_context(), "server_hostname": server_hostname}
        self._idle: deque[tuple[float, Connection]] = deque()

    async def take(self) -> Connection:
        """A connection, kept or new.

        Raises:
            OSError: the engine cannot be reached.
        """
        loop = asyncio.get_running_loop()
        while self._idle:
            since, kept = self._idle.pop()
            if kept.reusable and loop.time() - since < KEEPALIVE_S:
                return kept
            kept.abort()
        try:
            async with asyncio.timeout(self._timeout_s):
                _, made = await loop.create_connection(
                    lambda: Connection(self), self._host, self._port, **self._tls
                )
        except TimeoutError:
            raise ConnectionError("the engine does not accept connections") from None
        return made

    def give_back(self, connection: Connection) -> None:
        """Keep a connection, or hang up if its answer is not complete."""
        if connection.reusable:
            self._idle.append((asyncio.get_running_loop().time(), connection))
        else:
            connection.abort()

    def close_idle(self, older_than_s: float = KEEPALIVE_S) -> None:
        """Close connections that nobody needed for a while."""
        before = asyncio.get_running_loop().time() - older_than_s
        while self._idle and self._idle[0][0] <= before:
            self._idle.popleft()[1].abort()


def is_local(error: Exception) -> bool:
    """Whether a connection was not made for want of something on this machine."""
    return getattr(error, "errno", None) in _LOCAL_ERRORS


def request_head(target: str, headers: Mapping[str, str], length: int) -> bytes:
    """The head of a POST request.

    Raises:
        ValueError: a header would end the head.
    """
    lines = [f"POST {target} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header holds the end of a line")
    return ("\r\n".join([*lines, f"content-length: {length}"]) + "\r\n\r\n").encode("latin-1")
