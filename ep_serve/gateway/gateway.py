"""The components of a gateway and their background tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from ep_serve.gateway.body.reader import BodyReader
from ep_serve.gateway.keys import KeyRing
from ep_serve.gateway.limits import KeyLimits
from ep_serve.gateway.media.service import MediaService
from ep_serve.gateway.metrics import Metrics
from ep_serve.gateway.tracing import create_tracing
from ep_serve.gateway.upstream.pool import UpstreamPool
from ep_serve.gateway.upstream.relay import Relay
from ep_serve.gateway.upstream.router import Router

if TYPE_CHECKING:
    from starlette.requests import Request

    from ep_serve.gateway.settings import GatewaySettings

logger = logging.getLogger(__name__)

KEY_RELOAD_INTERVAL_S = 2.0
SWEEP_INTERVAL_S = 30.0


class Gateway:
    """The components that requests share. `open` and `close` run in one event loop."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self.tracing = create_tracing(settings.tracing)
        self.keys = KeyRing(settings.keys_file)
        self.limits = KeyLimits(self.metrics)
        self.bodies = BodyReader(settings.request, settings.media.max_per_request)
        self.upstreams = UpstreamPool(settings, self.metrics)
        self.router = Router(self.upstreams, settings, self.metrics, self.tracing)
        self.relay = Relay(self.router, self.upstreams, settings.routing, self.metrics)
        self.media = MediaService(settings, self.limits, self.metrics, self.tracing)
        self.is_draining = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_ready(self) -> bool:
        """Whether it accepts requests: it is not draining and an engine is available."""
        return not self.is_draining and any(one.is_available for one in self.upstreams.all)

    async def open(self) -> None:
        await self.media.open()
        await self.upstreams.open()
        routing = self.settings.routing
        self._tasks = [
            asyncio.create_task(_run_periodically(seconds, work))
            for seconds, work in (
                (routing.health_interval_s, self.upstreams.check),
                (routing.dns_interval_s, self.upstreams.resolve),
                (KEY_RELOAD_INTERVAL_S, self._reload_keys),
                (SWEEP_INTERVAL_S, self._sweep),
            )
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.upstreams.close()
        await self.media.close()
        await self.tracing.close()

    async def _reload_keys(self) -> None:
        await asyncio.to_thread(self.keys.reload_if_changed)  # parsing many keys takes a while

    async def _sweep(self) -> None:
        await self.media.store.sweep()


def get_gateway(request: Request) -> Gateway:
    """Return the gateway of a request."""
    gateway: Gateway = request.app.state.gateway
    return gateway


async def _run_periodically(seconds: float, work: Callable[[], Awaitable[Any]]) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await work()
        except Exception:  # a failure must not end the periodic task
            logger.exception("a background task failed")
