"""Discovery, health checks and circuit breakers of the engines."""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import logging
import socket
import time
from typing import TYPE_CHECKING, Any

import aiohttp
import pydantic_core
from yarl import URL

from ep_serve.gateway.upstream.circuit import Circuit
from ep_serve.gateway.upstream.connection import (
    KEEPALIVE_S,
    ConnectionPool,
    is_local_error,
    request_head,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import SecretStr

    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import GatewaySettings, RoutingSettings
    from ep_serve.gateway.upstream.circuit import Outcome

logger = logging.getLogger(__name__)

UNHEALTHY_AFTER = 2
"""Consecutive failed health checks."""
MAX_LAG_S = 0.5
"""Event loop delay up to which a timed-out health check counts as failed."""
BUSY = frozenset({429, 503})
"""Statuses of an engine that is temporarily overloaded."""
MAX_BODY = 2**20
"""Bytes of a model list or of the response to a trial request."""
SAME_CRASH_S = 2.0
"""Requests dropped within this time of each other count as one crash."""

_crashes = itertools.count()


class Upstream:
    """An engine at one address.

    `work` is the total cost of its running requests, `active` their number.
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
        self.is_retired = False
        self.models: dict[str, dict[str, Any]] | None = None
        timeout_s = settings.connect_timeout_s
        self.connections = ConnectionPool(self.url, self.server_hostname, timeout_s)
        self._chat = str((self.url / "v1" / "chat" / "completions").relative())
        self._headers = {"host": self.host_header, "accept-encoding": "identity"}
        self._headers["content-type"] = "application/json"
        if key is not None:
            self._headers["authorization"] = f"Bearer {key.get_secret_value()}"
        self._settings = settings
        self.circuit = Circuit(settings)
        self._healthy = False
        self._failed_checks = 0
        self._crash_id = 0
        self._crashed_at = float("-inf")

    @property
    def is_available(self) -> bool:
        """Whether it is healthy and its circuit is closed."""
        return self.is_healthy and not self.circuit.is_open

    @property
    def is_healthy(self) -> bool:
        return self._healthy and not self.is_retired

    @property
    def is_full(self) -> bool:
        return self.active >= self._settings.concurrency

    def serves(self, model: str) -> bool:
        return self.models is None or model in self.models

    def chat_head(self, headers: dict[str, str], length: int) -> bytes:
        """Return the head of a chat request with a body of `length` bytes."""
        return request_head(self._chat, {**self._headers, **headers}, length)

    def begin(self, work: float) -> None:
        self.active += 1
        self.work += work

    def end(self, work: float, outcome: Outcome | None) -> None:
        """Finish a request; `outcome` is None if it tells nothing about the engine."""
        self.active -= 1
        self.work = self.work - work if self.active else 0.0
        if outcome is not None:
            self.circuit.record(outcome)

    def is_silent_for(self, seconds: float) -> bool:
        """Return whether no client received a chunk of a response for that long."""
        return asyncio.get_running_loop().time() - self.connections.last_received_at >= seconds

    def record_crash(self) -> int:
        """Record a dropped request; return the id of the crash that it belongs to."""
        now = time.monotonic()
        if now - self._crashed_at > SAME_CRASH_S:
            self._crash_id = next(_crashes)
        self._crashed_at = now
        return self._crash_id

    def record_health_check(self, healthy: bool) -> None:
        """Record the result of a health check."""
        self._failed_checks = 0 if healthy else self._failed_checks + 1
        if healthy and not self._healthy:  # perhaps a new process
            self.circuit.allow_trial()
            self._crashed_at = float("-inf")
        if healthy or self._failed_checks >= UNHEALTHY_AFTER:
            self._healthy = healthy

    def mark_unhealthy(self) -> None:
        """Record a failed liveness check."""
        self._healthy = False


class UpstreamPool:
    """All engines, resolved by host name and health checked.

    `on_available` is called when an engine becomes available again.
    """

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        self._settings = settings.routing
        self._metrics = metrics
        self._bases = [URL(str(url)) for url in settings.upstreams]
        self._known: dict[tuple[URL, str], Upstream] = {}
        self._key = settings.upstream_api_key
        self._session: aiohttp.ClientSession | None = None
        self._trials: dict[Upstream, asyncio.Task[None]] = {}
        self._liveness_checks: dict[Upstream, asyncio.Task[bool]] = {}
        self.on_available: Callable[[], None] = lambda: None

    @property
    def all(self) -> list[Upstream]:
        return list(self._known.values())

    @property
    def session(self) -> aiohttp.ClientSession:
        """HTTP session for health checks and trial requests."""
        assert self._session is not None
        return self._session

    async def open(self) -> None:
        """Resolve the engines and check their health once."""
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
        tasks = [*self._trials.values(), *self._liveness_checks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for upstream in self.all:
            upstream.connections.close_idle(0)
        await self.session.close()

    async def resolve(self) -> None:
        """Resolve host names again: add new addresses, retire vanished ones."""
        found: dict[tuple[URL, str], Upstream] = {}
        for base in self._bases:
            addresses = await _addresses(base)
            if addresses is None:  # resolution failed: keep the known addresses
                addresses = [address for known, address in self._known if known == base]
            for address in addresses:
                known = self._known.get((base, address))
                found[base, address] = known or Upstream(base, address, self._settings, self._key)
        for place, upstream in self._known.items():
            if place not in found:
                upstream.is_retired = True
                upstream.connections.close_idle(0)
                self._remove_gauges(upstream)
                logger.info("engine gone", extra={"upstream": upstream.name})
        self._known = found

    async def check(self) -> None:
        """Check the health and models of every engine and start due trial requests."""
        await asyncio.gather(*(self._check(upstream) for upstream in self.all))

    def check_liveness(self, upstream: Upstream) -> asyncio.Future[bool]:
        """Check the health of an engine that failed a request; true if it is dead.

        Concurrent failures share one check. A timeout does not count as dead.
        """
        task = self._liveness_checks.get(upstream)
        if task is None:
            task = asyncio.create_task(self._check_liveness(upstream))
            self._liveness_checks[upstream] = task
            task.add_done_callback(lambda _: self._liveness_checks.pop(upstream, None))
        return asyncio.shield(task)

    async def _check_liveness(self, upstream: Upstream) -> bool:
        try:
            async with asyncio.timeout(self._settings.health_timeout_s):
                dead = not await self._health(upstream)
        except TimeoutError:
            return False
        except (aiohttp.ClientError, OSError) as error:
            dead = not is_local_error(error)
        if dead:
            upstream.mark_unhealthy()
            self._log_state(upstream, "down")
        return dead

    async def _health(self, upstream: Upstream) -> bool:
        url = upstream.url / "health"
        async with self.session.get(url, **request_options(upstream)) as answer:
            return answer.status == 200

    async def _check(self, upstream: Upstream) -> None:
        before, available = upstream.is_healthy, upstream.is_available
        since = asyncio.get_running_loop().time()
        upstream.connections.close_idle()
        reason = "its /health fails"
        try:
            async with asyncio.timeout(self._settings.health_timeout_s):
                healthy = await self._health(upstream)
                if healthy:
                    reason = "its /v1/models fails"
                    upstream.models = await self._models(upstream)
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            if self._is_own_fault(error, since):
                logger.warning("no health check", extra={"upstream": upstream.name}, exc_info=error)
                return
            healthy, reason = False, f"{reason}: {type(error).__name__}"
        upstream.record_health_check(healthy)
        if before != upstream.is_healthy:
            self._log_state(upstream, "up" if upstream.is_healthy else f"down, {reason}")
        due = upstream.is_healthy and upstream.circuit.needs_trial
        if due and upstream not in self._trials:
            task = asyncio.create_task(self._run_trial(upstream))
            self._trials[upstream] = task
            task.add_done_callback(lambda _: self._trials.pop(upstream, None))
        self._update_gauges(upstream)
        if upstream.is_available and not available:
            self.on_available()

    def _is_own_fault(self, error: Exception, since: float) -> bool:
        """Whether a failed check is due to a lack of sockets or CPU time in this process."""
        if isinstance(error, TimeoutError):
            late = asyncio.get_running_loop().time() - since
            return late > self._settings.health_timeout_s + MAX_LAG_S
        return is_local_error(error)

    async def _models(self, upstream: Upstream) -> dict[str, dict[str, Any]] | None:
        """Return its models by name, or None if it does not list them."""
        url = upstream.url / "v1" / "models"
        async with self.session.get(url, **request_options(upstream)) as answer:
            if answer.status != 200:
                return None
            body = pydantic_core.from_json(await _body(answer))
        entries = body.get("data") if isinstance(body, dict) else None
        if not isinstance(entries, list):
            return None
        models = [entry for entry in entries if isinstance(entry, dict)]
        return {entry["id"]: entry for entry in models if isinstance(entry.get("id"), str)}

    async def _run_trial(self, upstream: Upstream) -> None:
        """Send a small request to find out whether an engine works."""
        timeout_s = self._settings.first_byte_timeout_s
        request: dict[str, Any] = {
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 1,
        }
        if upstream.models:
            request["model"] = next(iter(upstream.models))
        works: bool | None = False
        url = upstream.url / "v1" / "chat" / "completions"
        try:
            async with asyncio.timeout(timeout_s):
                async with self.session.post(
                    url, json=request, **request_options(upstream)
                ) as answer:
                    await _body(answer)
                    # A 4xx counts as success: the request may not suit the model.
                    works = None if answer.status in BUSY else answer.status < 500
        except TimeoutError:
            works = False if upstream.is_silent_for(timeout_s) else None
        except (aiohttp.ClientError, OSError, ValueError):
            pass
        available = upstream.is_available
        upstream.circuit.record_trial(works)
        logger.warning("trial request", extra={"upstream": upstream.name, "works": works})
        self._update_gauges(upstream)
        if upstream.is_available and not available:
            self.on_available()

    def _log_state(self, upstream: Upstream, state: str) -> None:
        logger.warning("engine %s", state, extra={"upstream": upstream.name})

    def _update_gauges(self, upstream: Upstream) -> None:
        if not upstream.is_retired:
            self._metrics.upstream_up.labels(upstream.name).set(upstream.is_available)
            self._metrics.upstream_work.labels(upstream.name).set(upstream.active)

    def _remove_gauges(self, upstream: Upstream) -> None:
        for gauge in (self._metrics.upstream_up, self._metrics.upstream_work):
            try:
                gauge.remove(upstream.name)
            except KeyError:
                continue


def request_options(upstream: Upstream) -> dict[str, Any]:
    """Return options that address a request to the host name the engine was resolved from."""
    options: dict[str, Any] = {
        "headers": {"host": upstream.host_header},
        "allow_redirects": False,
    }
    if upstream.server_hostname:
        options["server_hostname"] = upstream.server_hostname
    return options


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    """Read a small body.

    Raises:
        ValueError: it is larger than `MAX_BODY`.
    """
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY:
            raise ValueError(f"the body exceeds {MAX_BODY} bytes")
    return bytes(body)


async def _addresses(base: URL) -> list[str] | None:
    """Resolve a host; only IPv4 if it has both, which would count as two engines."""
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
