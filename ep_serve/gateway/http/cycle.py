"""A request/response cycle on a connection."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from ep_serve.gateway.errors import internal_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class Cycle(RequestResponseCycle):
    """A request/response cycle.

    Args:
        protocol: the connection.
        version: the HTTP version.
        discarding: returns whether the connection discards incoming data.
        ended: called when the application has returned.
    """

    def __init__(
        self,
        protocol: HttpToolsProtocol,
        version: str,
        *,
        discarding: Callable[[], bool],
        ended: Callable[[], None],
    ) -> None:
        expects = [value.lower() for name, value in protocol.headers if name == b"expect"]
        super().__init__(
            scope=protocol.scope,
            transport=protocol.transport,
            flow=protocol.flow,
            logger=protocol.logger,
            access_logger=protocol.access_logger,
            access_log=protocol.access_log,
            default_headers=protocol.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=version != "1.0" and b"100-continue" in expects,
            keep_alive=version != "1.0" and protocol.parser.should_keep_alive(),
            on_response=protocol.on_response_complete,
        )
        self.lingers = False
        """Whether the response was sent before the whole request arrived."""
        self._discarding = discarding
        self._ended = ended
        self._until_close = False

    async def run_asgi(self, app: Any) -> None:
        await super().run_asgi(app)
        self._ended()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            if self.more_body:  # the rest would not be read
                self.keep_alive = False
            if self.scope["http_version"] == "1.0":  # no chunked encoding
                names = {name.lower() for name, _ in message["headers"]}
                self._until_close = b"content-length" not in names
                self.chunked_encoding = False if self._until_close else None
        else:
            if self._until_close:
                self.expected_content_length = len(message.get("body", b""))
            if not self.keep_alive and not message.get("more_body", False):
                # Else the base class would close the connection at once.
                self.lingers = self.keep_alive = self.more_body or self._discarding()
        await super().send(message)

    async def send_500_response(self) -> None:
        response: Any = internal_error().response()
        await response(self.scope, self.receive, self.send)

    def disconnect(self) -> None:
        """Send `http.disconnect` to the application."""
        if not self.response_complete:
            self.disconnected = True
            self.message_event.set()
