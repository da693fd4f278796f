"""Running the gateway: its port for clients, its port for engines, and its end.

SIGTERM: `/ready` says 503 for a while, so that nobody sends more; then the port closes, running
answers are finished, and only then does the port for engines close.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn
from prometheus_client import start_http_server
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ep_serve.gateway.app import create_app
from ep_serve.gateway.gateway import Gateway
from ep_serve.gateway.settings import SettingsError
from ep_serve.gateway.streaming import BodyWriter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from ep_serve.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

BACKLOG = 2_048


class ImpatientProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, with limits on the size of a request's head and on the time it takes.

    uvicorn has none here: a client could send a head without end, or hold connections without a
    word.
    """

    max_head_bytes = 32_768
    head_timeout_s = 20.0
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        if self._head_timer is None and (self.cycle is None or self.cycle.response_complete):
            self._await_head()  # the next request of a connection begins
        if self._head_timer is not None:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._head_bytes > self.max_head_bytes:
            self._close()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()
        if self.cycle is not None and self.cycle.scope is self.scope:
            writer = BodyWriter(self.transport, self.flow)
            self.scope["extensions"] = {BodyWriter.EXTENSION: writer}  # type: ignore[dict-item]

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(self.head_timeout_s, self._close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close(self) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Leaves signals to `serve`, which stops several servers in order."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(slots=True)
class Running:
    """A gateway whose ports are open."""

    gateway: Gateway
    port: int
    front: uvicorn.Server
    ended: asyncio.Task[None]
    """Done when the port for clients has closed and its last answer is sent."""

    async def drain(self, hurry: asyncio.Event | None = None) -> None:
        """Let new requests go elsewhere, then finish the running ones; `hurry` cuts it short."""
        logger.info("draining")
        self.gateway.draining = True
        waiting = asyncio.create_task((hurry or asyncio.Event()).wait())
        await asyncio.wait({waiting}, timeout=self.gateway.settings.drain.delay_s)
        self.front.should_exit = True
        await asyncio.wait({self.ended, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not self.ended.done():
            self.front.force_exit = True
        await self.ended
        waiting.cancel()


@asynccontextmanager
async def running(settings: GatewaySettings) -> AsyncIterator[Running]:
    """A gateway that answers inside the block. Engines can fetch media until its very end.

    Raises:
        SettingsError: a port or a folder cannot be used.
    """
    gateway = Gateway(settings)
    public = _listen(settings.host, settings.port, "port")
    internal = _listen(settings.internal.host, settings.internal.port, "internal.port")
    gateway.media.lender.base_url = _base_url(settings, internal)
    metrics = _start_metrics(settings, gateway)
    await gateway.open()
    front = _server(create_app(gateway), settings)
    back = _server(gateway.media.lender.app, settings)
    lending = asyncio.create_task(back.serve(sockets=[internal]))
    ended = asyncio.create_task(front.serve(sockets=[public]))
    try:
        while not (front.started and back.started) and not ended.done():
            await asyncio.sleep(0.01)
        port = public.getsockname()[1]
        logger.info("listening", extra={"host": settings.host, "port": port})
        yield Running(gateway, port, front, ended)
    finally:
        front.should_exit = True
        await asyncio.wait({ended})
        back.should_exit = True
        await asyncio.wait({lending})
        await gateway.close()
        if metrics is not None:
            metrics.shutdown()
            metrics.server_close()


async def serve(settings: GatewaySettings) -> None:
    """Run a gateway until SIGTERM or SIGINT; a second one ends it at once.

    Raises:
        SettingsError: a port or a folder cannot be used.
    """
    async with running(settings) as now:
        # What lives now stays. Requests leave no cycles behind, and looking for some after every
        # few hundred objects was a tenth of the work.
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)
        asked, hurry = asyncio.Event(), asyncio.Event()

        def signalled() -> None:
            (hurry if asked.is_set() else asked).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, signalled)
        stop = asyncio.create_task(asked.wait())
        await asyncio.wait({stop, now.ended}, return_when=asyncio.FIRST_COMPLETED)
        await now.drain(hurry)


def _server(app: Any, settings: GatewaySettings) -> uvicorn.Server:
    limits = {
        "head_timeout_s": settings.request.header_timeout_s,
        "max_head_bytes": settings.request.max_header_bytes,
    }
    protocol = type("Protocol", (ImpatientProtocol,), limits)
    return _Server(
        uvicorn.Config(
            app,
            loop="none",
            http=protocol,
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            limit_concurrency=settings.request.max_connections,
            timeout_graceful_shutdown=int(settings.drain.timeout_s),
            backlog=BACKLOG,
        )
    )


def _listen(host: str, port: int, setting: str) -> socket.socket:
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        raise SettingsError(
            f"{setting}: cannot listen on {host}:{port} ({error.strerror})"
        ) from None
    sock.set_inheritable(False)
    return sock


def _base_url(settings: GatewaySettings, internal: socket.socket) -> str:
    if settings.internal.url is not None:
        return str(settings.internal.url).rstrip("/")
    host = settings.internal.host
    return f"http://{f'[{host}]' if ':' in host else host}:{internal.getsockname()[1]}"


def _start_metrics(settings: GatewaySettings, gateway: Gateway) -> Any:
    if not settings.metrics.enabled:
        return None
    try:
        server, _ = start_http_server(
            settings.metrics.port, settings.metrics.host, gateway.metrics.registry
        )
    except OSError as error:
        raise SettingsError(
            f"metrics.port: cannot listen on {settings.metrics.host}:{settings.metrics.port} "
            f"({error.strerror})"
        ) from None
    return server
