"""The engines: their addresses, their health, and whether they are left alone for a while."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import pydantic_core
from yarl import URL

from ep_serve.gateway.connections import KEEPALIVE_S, Connections, request_head

if TYPE_CHECKING:
    from pydantic import SecretStr

    from ep_serve.gateway.context import Context
    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import GatewaySettings, RoutingSettings

logger = logging.getLogger(__name__)

UNHEALTHY_AFTER = 2
"""Failed health checks in a row."""
MODELS_BYTES = 2**20


class Upstream:
    """One address of one engine.

    `work` is the cost of what it works on, `active` the number of requests.
    """

    def __init__(
        self, base: URL, address: str, settings: RoutingSettings, key: SecretStr | None = None
    ) -> None:
        self.url = base.with_host(address)
        self.host_header = base.authority
        self.server_hostname = base.host if base.scheme == "https" else None
        self.name = f"{self.url.host}:{self.url.port}"
        self.work = 0.0
        self.active = 0
        self.retired = False
        self.models: dict[str, dict[str, Any]] | None = None
        timeout_s = settings.connect_timeout_s
        self.connections = Connections(self.url, self.server_hostname, timeout_s)
        self._chat = str((self.url / "v1" / "chat" / "completions").relative())
        self._headers = {"host": self.host_header, "accept-encoding": "identity"}
        self._headers["content-type"] = "application/json"
        if key is not None:
            self._headers["authorization"] = f"Bearer {key.get_secret_value()}"
        self._settings = settings
        self._healthy = False
        self._failed_checks = 0
        self._failures = 0
        self._open_until = 0.0
        self._trial = False

    @property
    def available(self) -> bool:
        """Whether it may get a request: healthy, and its circuit is closed or due for a trial."""
        if not self._healthy or self.retired:
            return False
        if self._failures < self._settings.breaker_failures:
            return True
        return time.monotonic() >= self._open_until and not self._trial

    @property
    def healthy(self) -> bool:
        return self._healthy and not self.retired

    @property
    def full(self) -> bool:
        return self.active >= self._settings.concurrency

    def serves(self, model: str) -> bool:
        return self.models is None or model in self.models

    def chat_head(self, context: Context, length: int) -> bytes:
        """The head of a chat request with a body of `length` bytes."""
        headers = {**self._headers, **context.upstream_headers()}
        return request_head(self._chat, headers, length)

    def begin(self, work: float) -> None:
        self.active += 1
        self.work += work
        if self._failures >= self._settings.breaker_failures:
            self._trial = True

    def end(self, work: float, failed: bool | None) -> None:
        """Finish a request; `failed` is None if it says nothing about the engine."""
        self.active -= 1
        self.work = self.work - work if self.active else 0.0
        if failed is not None:
            self._trial = False
            self._failures = self._failures + 1 if failed else 0
            if self._failures >= self._settings.breaker_failures:
                self._open_until = time.monotonic() + self._settings.breaker_reset_s
        elif not self.active:
            self._trial = False

    def checked(self, healthy: bool) -> None:
        """Note a health check."""
        self._failed_checks = 0 if healthy else self._failed_checks + 1
        if healthy and not self._healthy:
            self._failures = 0
            self._trial = False
        if healthy or self._failed_checks >= UNHEALTHY_AFTER:
            self._healthy = healthy


class Upstreams:
    """All engines, found by name and watched."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        self._settings = settings.routing
        self._metrics = metrics
        self._bases = [URL(str(url)) for url in settings.upstreams]
        self._known: dict[tuple[URL, str], Upstream] = {}
        self._key = settings.upstream_api_key
        self._session: aiohttp.ClientSession | None = None

    @property
    def all(self) -> list[Upstream]:
        return list(self._known.values())

    @property
    def session(self) -> aiohttp.ClientSession:
        """The connections to the engines."""
        assert self._session is not None
        return self._session

    async def open(self) -> None:
        """Find the engines and ask once how they are."""
        headers = {"accept-encoding": "identity"}
        if self._key is not None:
            headers["authorization"] = f"Bearer {self._key.get_secret_value()}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=headers,
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self._settings.connect_timeout_s
            ),
        )
        await self.resolve()
        await self.check()

    async def close(self) -> None:
        for upstream in self.all:
            upstream.connections.close_idle(0)
        await self.session.close()

    async def resolve(self) -> None:
        """Look the names up again: new addresses join, vanished ones get no new requests."""
        found: dict[tuple[URL, str], Upstream] = {}
        for base in self._bases:
            addresses = await _addresses(base)
            if addresses is None:  # the name service is down: keep what is known
                addresses = [address for known, address in self._known if known == base]
            for address in addresses:
                known = self._known.get((base, address))
                found[base, address] = known or Upstream(base, address, self._settings, self._key)
        for place, upstream in self._known.items():
            if place not in found:
                upstream.retired = True
                upstream.connections.close_idle(0)
                self._forget(upstream)
                logger.info("engine gone", extra={"upstream": upstream.name})
        self._known = found

    async def check(self) -> None:
        """Ask every engine how it is and which models it serves."""
        await asyncio.gather(*(self._check(upstream) for upstream in self.all))

    async def _check(self, upstream: Upstream) -> None:
        before = upstream.healthy
        upstream.connections.close_idle()
        try:
            async with asyncio.timeout(self._settings.health_timeout_s):
                async with self.session.get(
                    upstream.url / "health", **request_options(upstream)
                ) as answer:
                    healthy = answer.status == 200
                if healthy and not before:
                    upstream.models = await self._models(upstream)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            healthy = False
        upstream.checked(healthy)
        self._metrics.upstream_up.labels(upstream.name).set(upstream.available)
        self._metrics.upstream_work.labels(upstream.name).set(upstream.active)
        if before != upstream.healthy:
            state = "up" if upstream.healthy else "down"
            logger.warning("engine %s", state, extra={"upstream": upstream.name})

    async def _models(self, upstream: Upstream) -> dict[str, dict[str, Any]] | None:
        """Its models by name; None if it does not tell."""
        async with self.session.get(
            upstream.url / "v1" / "models", **request_options(upstream)
        ) as answer:
            if answer.status != 200:
                return None
            body = pydantic_core.from_json(await answer.content.read(MODELS_BYTES))
        entries = body.get("data") if isinstance(body, dict) else None
        if not isinstance(entries, list):
            return None
        models = [entry for entry in entries if isinstance(entry, dict)]
        return {entry["id"]: entry for entry in models if isinstance(entry.get("id"), str)}

    def _forget(self, upstream: Upstream) -> None:
        for gauge in (self._metrics.upstream_up, self._metrics.upstream_work):
            try:
                gauge.remove(upstream.name)
            except KeyError:
                continue


def request_options(upstream: Upstream) -> dict[str, Any]:
    """What makes a request to an address a request to the name it was found by."""
    options: dict[str, Any] = {
        "headers": {"host": upstream.host_header},
        "allow_redirects": False,
    }
    if upstream.server_hostname:
        options["server_hostname"] = upstream.server_hostname
    return options


async def _addresses(base: URL) -> list[str] | None:
    """The addresses of a host, IPv4 if it has any: an engine with both is one engine."""
    host = base.host or ""
    try:
        return [str(ipaddress.ip_address(host))]
    except ValueError:
        pass
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(
            host, base.port, type=socket.SOCK_STREAM
        )
    except OSError:
        return None
    four = [str(info[4][0]) for info in infos if info[0] == socket.AF_INET]
    six = [str(info[4][0]) for info in infos if info[0] == socket.AF_INET6]
    return sorted(set(four or six))
