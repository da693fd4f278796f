"""Hardened HTTP/1.1 protocol for unauthenticated clients, based on uvicorn's.

uvicorn limits neither size nor duration of a request head, nor the number of pipelined requests; it
treats trailers as headers, and loses the body of a request with `Upgrade`. All errors have the
format of the API.
"""

from __future__ import annotations

import asyncio
import urllib.parse
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NoReturn

import httptools
import pydantic_core
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.http.body_writer import BodyWriter
from ep_serve.gateway.http.cycle import Cycle
from ep_serve.gateway.http.request_head import head_error, invalid_http
from ep_serve.gateway.http.write_watchdog import WriteWatchdog

if TYPE_CHECKING:
    from collections.abc import Callable

    from ep_serve.gateway.http.client_connections import ClientConnections

MAX_PIPELINED = 8
"""Queued requests of one connection."""
MAX_QUEUED_BYTES = 16 * 2**20
"""Bytes of queued requests over all connections."""
MAX_HEADERS = 128
SLICE = 64 * 2**10
"""Bytes that are parsed between checks of the limits."""
LINGER_S = 2.0
LINGER_BYTES = 64 * 2**20
"""Duration and bytes for which the rest of a body is discarded after an early response: closing the
connection at once would reset it, and the client would lose the response."""
LINGER_ERROR_BYTES = 2**20
"""The same after an invalid request."""
ALWAYS_ANSWERED = frozenset({b"/health", b"/ready"})

_JSON_HEAD = (
    b"HTTP/1.1 %d %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n"
    b"connection: close\r\n\r\n"
)


class HttpProtocol(HttpToolsProtocol):
    """A client connection. Subclasses set `clients`."""

    clients: ClientConnections

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # uvicorn's parser reads on after a request that closes the connection.
        self.parser = httptools.HttpRequestParser(self)
        self._running: Cycle | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._write_watchdog: WriteWatchdog
        self._idle = False
        """Whether the connection is kept alive without a new request."""
        self._in_head = False
        self._discarding = False
        """Whether incoming data is discarded."""
        self._head_bytes = 0
        """Bytes of the current head."""
        self._framing_bytes = 0
        """Bytes received since the head, without body content."""
        self._dropped_bytes = 0
        self._queued_bytes = 0
        self._error: ApiError | None = None
        """The first error of the incoming data."""

    # -- the transport -----------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._write_watchdog = WriteWatchdog(transport, self._write_timed_out)
        now = self.loop.time()
        self._arm(self.clients.head_timeout_s, self._head_timed_out)
        self.clients.mark_waiting(self, now, fresh=True)
        self.clients.close_excess(len(self.connections), now)

    def connection_lost(self, exc: Exception | None) -> None:
        self.clients.remove(self)
        self._disarm()
        self._write_watchdog.stop()
        self.pipeline.clear()
        self._unqueue()
        if self._running is not None:
            self._running.disconnect()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._discarding:
            self._drop(len(data))
            return
        if self._idle:
            self._idle = False
            self._arm(self.clients.head_timeout_s, self._head_timed_out)
        for start in range(0, len(data), SLICE):
            piece = data[start : start + SLICE] if len(data) > SLICE else data
            self._framing_bytes += len(piece)
            try:
                self._feed(piece)
            except httptools.HttpParserError as error:
                self._fail(self._error or invalid_http(f"The request is not HTTP: {error}."))
                return
            if self._framing_bytes > self.clients.max_head_bytes:
                self._fail(_too_large(self.clients.max_head_bytes))
                return

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_watchdog.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._write_watchdog.stop()

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._close()

    # -- the parser --------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if len(self.pipeline) == MAX_PIPELINED:
            self._refuse(invalid_http("Too many requests are pipelined."))
        super().on_message_begin()
        self._in_head, self._head_bytes, self._framing_bytes = True, 0, 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head_bytes += len(url)
        limit = self.clients.max_head_bytes
        if self._head_bytes > limit:
            message = f"The target of a request may have at most {limit} bytes."
            self._refuse(ApiError(414, message, code="uri_too_long"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:  # trailers are ignored (RFC 9110, 6.5.1)
            return
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self.clients.max_head_bytes:
            self._refuse(_too_large(self.clients.max_head_bytes))
        if len(self.headers) == MAX_HEADERS:
            message = f"A request may have at most {MAX_HEADERS} headers."
            self._refuse(ApiError(431, message, code="headers_too_large"))
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if not self._in_head:
            return
        self._in_head, self._framing_bytes = False, 0
        version = self.parser.get_http_version()
        method = self.parser.get_method()
        if error := head_error(self.headers, method, version):
            self._refuse(error)
        if self.parser.should_upgrade():  # see `_feed`
            return
        self._describe(method, version)
        answering = self._answering
        cycle = Cycle(self, version, discarding=lambda: self._discarding, ended=self._request_ended)
        self.cycle = cycle
        if answering is None:
            self._start(cycle)
        else:
            self._queue(self._head_bytes)
            self.pipeline.appendleft((cycle, self.app))

    def on_body(self, body: bytes) -> None:
        # Small chunks are allowed, but most of the received bytes must be content.
        self._framing_bytes = max(0, self._framing_bytes - 2 * len(body) - 16)
        if self.cycle is not self._running:
            self._queue(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        """Parse data and ignore `Upgrade` (RFC 9110, 7.8).

        The parser skips the body of a request with `Upgrade`, so the head is fed again without it.
        """
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                version = self.parser.get_http_version().encode()
                head = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
                head += [b"%b: %b" % item for item in self.headers if item[0] != b"upgrade"]
                data = b"\r\n".join([*head, b"", data[upgrade.args[0] :]])
            else:
                return

    def _describe(self, method: bytes, version: str) -> None:
        """Fill the ASGI scope."""
        try:
            target = httptools.parse_url(self.url)
        except httptools.HttpParserInvalidURLError:
            self._refuse(invalid_http("The request target is not a valid URL."))
        path = target.path or b"/"
        self.scope["method"] = method.decode("ascii")
        self.scope["http_version"] = version
        self.scope["raw_path"] = path
        self.scope["path"] = urllib.parse.unquote(path.decode("ascii"))
        self.scope["query_string"] = target.query or b""
        writer = BodyWriter(self.transport, self.flow, chunked=version != "1.0")
        self.scope["extensions"] = {BodyWriter.EXTENSION: writer}  # type: ignore[dict-item]

    # -- requests ----------------------------------------------------------------------------

    @property
    def _answering(self) -> Cycle | None:
        """The request whose response is incomplete, or None."""
        running = self._running
        return None if running is None or running.response_complete else running

    def _start(self, cycle: Cycle) -> None:
        self._disarm()
        self.clients.remove(self)
        self._running = cycle
        self.clients.requests.start(partial(self._sender, cycle), partial(self._run, cycle))

    def _sender(self, cycle: Cycle) -> tuple[str | None, str | None]:
        """Return the sender of a request: its address, perhaps of a proxy, and its tenant.

        Invalid keys do not count, or each would be scheduled as a separate sender.
        """
        keys = (value for name, value in cycle.scope["headers"] if name == b"authorization")
        key = next(keys, None)
        tenant = self.clients.tenant_of(None if key is None else key.decode("latin-1"))
        return self.client and self.client[0], tenant

    def _run(self, cycle: Cycle) -> None:
        if cycle.disconnected:
            return
        app: Any = self.app
        if (
            len(self.tasks) >= self.clients.max_connections
            and cycle.scope["raw_path"] not in ALWAYS_ANSWERED
        ):
            self.clients.count_refused("requests")
            message = "The gateway has reached its limit of concurrent requests."
            error = ApiError(503, message, code="too_many_connections", retry_after=2)
            app = error.response()
            cycle.keep_alive = False
        self._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self._running is not None and self._running.lingers:
            self._linger()
        elif self.transport.is_closing():
            return
        elif self.pipeline:
            self.flow.resume_reading()
            cycle: Any = self.pipeline.pop()[0]
            if not self.pipeline:
                self._unqueue()
            self._start(cycle)
        elif self._error is not None:
            self._answer(self._error)
        else:
            self.flow.resume_reading()
            self.clients.mark_waiting(self, self.loop.time(), fresh=False)
            self._idle = not self._in_head
            if self._idle:
                self._arm(self.timeout_keep_alive, self._close)
            else:
                self._arm(self.clients.head_timeout_s, self._head_timed_out)

    def _request_ended(self) -> None:
        """Handle the return of the application."""
        if self.transport.is_closing() and self in self.connections:
            self.clients.mark_waiting(self, self.loop.time(), fresh=False)
            self._close()

    def _queue(self, nbytes: int) -> None:
        """Count bytes of a pipelined request that is queued."""
        self._queued_bytes += nbytes
        self.clients.queued_bytes += nbytes
        if self.clients.queued_bytes > MAX_QUEUED_BYTES:
            self._refuse(invalid_http("Too many requests are pipelined."))

    def _unqueue(self) -> None:
        self.clients.queued_bytes -= self._queued_bytes
        self._queued_bytes = 0

    # -- errors and closing ------------------------------------------------------------------

    def _refuse(self, error: ApiError) -> NoReturn:
        """Stop the parser with an error."""
        self._error = error
        raise error

    def _fail(self, error: ApiError) -> None:
        """Handle an error of the incoming data; requests before it are answered first."""
        self.clients.count_refused(error.code or "")
        self._discarding, self._error = True, error
        running = self._answering
        if running is None:
            self._answer(error)
        elif running is self.cycle and running.more_body:
            self._running = None
            running.disconnect()
            if running.response_started:
                self._close()
            else:
                self._answer(error)
        else:
            if self.pipeline and self.cycle.more_body:
                self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else running

    def _answer(self, error: ApiError) -> None:
        body = pydantic_core.to_json(error.body)
        phrase = HTTPStatus(error.status).phrase.encode()
        self.transport.write(_JSON_HEAD % (error.status, phrase, len(body)) + body)
        self._linger()

    def _linger(self) -> None:
        """Close the write side and discard input until the client closes (lingering close)."""
        self._discarding = True
        if self._running is not None:
            self._running.body.clear()
        if self.transport.is_closing():
            return
        with suppress(OSError):  # the client has disconnected
            self.transport.write_eof()
        self.flow.resume_reading()
        self.clients.mark_waiting(self, self.loop.time(), fresh=True)
        self._arm(LINGER_S, self._close)

    def _drop(self, nbytes: int) -> None:
        self._dropped_bytes += nbytes
        if self._answering is not None:
            if self._dropped_bytes > SLICE:
                self.flow.pause_reading()
        elif self._dropped_bytes > (LINGER_ERROR_BYTES if self._error else LINGER_BYTES):
            self._close()
        else:  # the event loop would read up to 8 MB in one iteration
            self.flow.pause_reading()
            self.loop.call_soon(self._resume_dropping)

    def _resume_dropping(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _head_timed_out(self) -> None:
        if self._in_head:
            message = f"The request head took more than {self.clients.head_timeout_s:g} s."
            self._fail(ApiError(408, message, code="header_timeout"))
        else:
            self._close()

    def _close(self) -> None:
        self._disarm()
        self.transport.close()
        self._write_watchdog.start()

    def _write_timed_out(self) -> None:
        self.clients.count_refused("write_timeout")
        self.abort()

    def abort(self) -> None:
        """Close at once and drop the write buffer."""
        self._disarm()
        self.connections.discard(self)
        self.transport.abort()

    def _arm(self, seconds: float, action: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, action)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _too_large(limit: int) -> ApiError:
    message = (
        f"The head of a request and the framing of its body may have at most {limit} bytes each."
    )
    return ApiError(431, message, code="headers_too_large")
