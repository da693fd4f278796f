"""Run the HTTP servers of the gateway and shut them down gracefully.

On SIGTERM `/ready` returns 503 for a while, so that load balancers stop sending requests; then the
public port closes, running requests finish, and finally the internal port closes.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import resource
import signal
import socket
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import uvicorn
from prometheus_client import make_asgi_app

from ep_serve.gateway.api.app import create_app
from ep_serve.gateway.gateway import Gateway
from ep_serve.gateway.http.client_connections import ClientConnections
from ep_serve.gateway.http.protocol import HttpProtocol
from ep_serve.gateway.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from ep_serve.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

BACKLOG = 2_048
ACCEPTS = 16
"""Connections that are accepted per event loop iteration: libuv accepts one for each listening
socket, and during a flood new ones would wait for many iterations."""
OTHER_FILES = 1_024
"""Open files besides connections: media, the probe helper, the store."""


class _Server(uvicorn.Server):
    """Does not handle signals: `serve` stops several servers in order."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(slots=True)
class RunningGateway:
    """A gateway that is accepting requests."""

    gateway: Gateway
    port: int
    front: uvicorn.Server
    ended: asyncio.Task[None]
    """Done when the public port has closed and the last response is sent."""

    async def drain(self, force: asyncio.Event | None = None) -> None:
        """Stop accepting requests and finish the running ones; `force` cuts this short."""
        logger.info("draining")
        self.gateway.is_draining = True
        waiting = asyncio.create_task((force or asyncio.Event()).wait())
        await asyncio.wait({waiting}, timeout=self.gateway.settings.drain.delay_s)
        self.front.should_exit = True
        await asyncio.wait({self.ended, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not self.ended.done():
            self.front.force_exit = True
        await self.ended
        waiting.cancel()


@asynccontextmanager
async def running(settings: GatewaySettings) -> AsyncIterator[RunningGateway]:
    """Run a gateway inside the block. Engines can fetch media until its end.

    Raises:
        SettingsError: a port or a folder cannot be used.
    """
    gateway = Gateway(settings)
    public = _listen(settings.host, settings.port, "port")
    internal = _listen(settings.internal.host, settings.internal.port, "internal.port")
    gateway.media.server.base_url = _base_url(settings, internal)
    ports = [public, internal]
    servers = [
        _server(create_app(gateway), settings, gateway),
        _server(gateway.media.server.app, settings, gateway),
    ]
    if settings.metrics.enabled:
        ports.append(_listen(settings.metrics.host, settings.metrics.port, "metrics.port"))
        servers.append(_server(make_asgi_app(gateway.metrics.registry), settings, gateway))
    await gateway.open()
    tasks = [
        asyncio.create_task(server.serve(sockets=[port, *(port.dup() for _ in range(ACCEPTS - 1))]))
        for server, port in zip(servers, ports, strict=True)
    ]
    front, ended = servers[0], tasks[0]
    try:
        while not all(server.started for server in servers) and not ended.done():
            await asyncio.sleep(0.01)
        port = public.getsockname()[1]
        logger.info("listening", extra={"host": settings.host, "port": port})
        yield RunningGateway(gateway, port, front, ended)
    finally:
        for server, task in zip(servers, tasks, strict=True):
            server.should_exit = True
            await asyncio.wait({task})
        await gateway.close()


async def serve(settings: GatewaySettings) -> None:
    """Run a gateway until SIGTERM or SIGINT; a second signal ends it at once.

    Raises:
        SettingsError: a port or a folder cannot be used.
    """
    settings = _with_open_files(settings)
    async with running(settings) as now:
        # Long-lived objects are frozen. Requests leave no reference cycles behind, and collecting
        # after every few hundred objects took a tenth of the CPU time.
        gc.freeze()
        gc.set_threshold(10_000, 20, 50)
        asked, force = asyncio.Event(), asyncio.Event()

        def signalled() -> None:
            (force if asked.is_set() else asked).set()

        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, signalled)
        stop = asyncio.create_task(asked.wait())
        await asyncio.wait({stop, now.ended}, return_when=asyncio.FIRST_COMPLETED)
        await now.drain(force)


def _server(app: Any, settings: GatewaySettings, gateway: Gateway) -> uvicorn.Server:
    clients = ClientConnections(
        settings.request.max_connections,
        settings.request.max_header_bytes,
        settings.request.header_timeout_s,
        gateway.metrics.connections_refused,
        gateway.keys.tenant_of,
    )
    protocol = type("Protocol", (HttpProtocol,), {"clients": clients})
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
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise SettingsError(f"{setting}: cannot listen on {host}:{port} ({reason})") from None
    sock.set_inheritable(False)
    return sock


def _base_url(settings: GatewaySettings, internal: socket.socket) -> str:
    if settings.internal.url is not None:
        return str(settings.internal.url).rstrip("/")
    host = settings.internal.host
    return f"http://{f'[{host}]' if ':' in host else host}:{internal.getsockname()[1]}"


def _with_open_files(settings: GatewaySettings) -> GatewaySettings:
    """Raise the limit of open files to what the connections need, as far as allowed.

    If that is not enough, reduce `max_connections`: without free file descriptors the gateway could
    not connect to engines.
    """
    connections = settings.request.max_connections
    wanted = 2 * connections + OTHER_FILES  # to clients, and to engines
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == wanted:
        return settings
    fitting = min(connections, max((allowed - OTHER_FILES) // 2, allowed // 4))
    if fitting == connections:
        return settings
    logger.warning(
        "request.max_connections is %d instead of %d, which needs %d open files; %d are allowed",
        *(fitting, connections, wanted, allowed),
    )
    request = settings.request.model_copy(update={"max_connections": fitting})
    return settings.model_copy(update={"request": request})
