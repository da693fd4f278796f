"""HTTP/1.1 client connections to an engine, optimized for streams of small chunks.

HTTP libraries wake a task for each chunk of a body. With hundreds of streams that is most of the
gateway's CPU time, so this client calls a function from the parser (llhttp, which also parses the
clients' requests). It has no redirects, compression, upgrades or pipelining.
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
"""Idle connections are closed before an engine does it: after 5 s with `vllm serve`."""
MAX_HEAD = 64 * 2**10
SMALL = 64 * 2**10
"""Bodies up to this are copied behind their head: one write costs less than two."""
HIGH_WATER = 2**20
"""Buffered bytes from which on reading from the engine is paused."""

_LOCAL_ERRORS = frozenset(
    {errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
)

Sink = Callable[[bytes, bool], None]
"""Called with a chunk of a body, and whether it is the last one."""


class BrokenAnswerError(Exception):
    """An engine closed the connection early or violated HTTP."""


class Connection(asyncio.Protocol):
    """One connection: `send_request`, then `read_head`, then `read` or `deliver`."""

    def __init__(self, owner: ConnectionPool) -> None:
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

    def send_request(self, head: bytes, body: bytes) -> None:
        """Send a request."""
        assert self._transport is not None
        self._reset()
        if len(body) <= SMALL:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    async def read_head(self) -> None:
        """Read `status` and `headers`.

        Raises:
            BrokenAnswerError: the connection ended before them.
        """
        while not self._has_head:
            await self._wait_for_change()

    async def read(self) -> bytes:
        """Return the next bytes of the body, empty at its end.

        Raises:
            BrokenAnswerError: the connection ended before the body.
        """
        while not self._pieces and not self._complete:
            await self._wait_for_change()
        self.resume()
        return self._take_pieces()

    async def deliver(self, sink: Sink) -> None:
        """Call `sink` with each remaining chunk of the body as it arrives.

        Raises:
            BrokenAnswerError: the connection ended before the body.
            Exception: what `sink` raised.
        """
        self._sink = sink
        self.resume()
        self._deliver_pieces()
        while not self._complete or self._error is not None:
            await self._wait_for_change()

    def pause(self) -> None:
        """Stop reading from the engine."""
        if self._transport is not None and not (self._closed or self._paused):
            self._paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and self._paused and not self._closed:
            self._paused = False
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close the connection, which makes the engine cancel the request."""
        self._aborted = True
        if self._transport is not None:
            self._transport.abort()

    async def _wait_for_change(self) -> None:
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

    def _take_pieces(self) -> bytes:
        pieces, self._pieces, self._waiting_bytes = self._pieces, [], 0
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _deliver_pieces(self) -> None:
        if self._sink is not None and (self._pieces or self._complete):
            try:
                self._sink(self._take_pieces(), self._complete)
            except Exception as error:
                self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        self._sink = None
        self.abort()
        self._wake()

    # -- asyncio.Protocol ----------------------------------------------------------------------

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
            self._fail(BrokenAnswerError(f"the response head exceeds {MAX_HEAD} bytes"))
        if self._sink is not None:
            self._deliver_pieces()
        elif self._waiting_bytes > HIGH_WATER:
            self.pause()
        if self._sink is None or self._complete:
            self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        # A body without a length ends with the connection.
        is_close_delimited = not self.headers.keys() & {b"content-length", b"transfer-encoding"}
        intact = exc is None and not self._aborted
        if self._has_head and is_close_delimited and intact and not self._complete:
            self._complete = True
            self._deliver_pieces()
        self._wake()

    # -- callbacks of the parser ---------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:  # an unsolicited response
            self._keep_alive = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._has_head:  # trailers are ignored
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
                self._owner.last_received_at = self._loop.time()
            self._pieces.append(body)
            self._waiting_bytes += len(body)

    def on_message_complete(self) -> None:
        if self._has_head:
            self._keep_alive = not self._complete and self._parser.should_keep_alive()
            self._complete = True


class ConnectionPool:
    """A pool of keep-alive connections to one address.

    `last_received_at` is the event loop's time of the last chunk of a successful response. Errors
    and heads do not count: API servers send both while the engine behind them hangs.
    """

    def __init__(self, url: URL, server_hostname: str | None, connect_timeout_s: float) -> None:
        self._host = url.host or ""
        self._port = url.port or 0
        self._timeout_s = connect_timeout_s
        self.last_received_at = float("-inf")
        self._tls: dict[str, Any] = {}
        if server_hostname is not None:
            self._tls = {"ssl": ssl.create_default_context(), "server_hostname": server_hostname}
        self._idle: deque[tuple[float, Connection]] = deque()

    async def acquire(self) -> Connection:
        """Return an idle connection or open a new one.

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

    def release(self, connection: Connection) -> None:
        """Return a connection to the pool, or close it if its response is incomplete."""
        if connection.reusable:
            self._idle.append((asyncio.get_running_loop().time(), connection))
        else:
            connection.abort()

    def close_idle(self, older_than_s: float = KEEPALIVE_S) -> None:
        """Close connections that have been idle for at least this long."""
        before = asyncio.get_running_loop().time() - older_than_s
        while self._idle and self._idle[0][0] <= before:
            self._idle.popleft()[1].abort()


def is_local_error(error: Exception) -> bool:
    """Whether a connection failed because this machine ran out of a resource."""
    return getattr(error, "errno", None) in _LOCAL_ERRORS


def request_head(target: str, headers: Mapping[str, str], length: int) -> bytes:
    """Return the head of a POST request.

    Raises:
        ValueError: a header contains a line break.
    """
    lines = [f"POST {target} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items())]
    if any("\r" in line or "\n" in line for line in lines):
        raise ValueError("a header contains a line break")
    return ("\r\n".join([*lines, f"content-length: {length}"]) + "\r\n\r\n").encode("latin-1")
