"""The engines: their addresses, their health, and whether they are left alone for a while."""

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
from ep_serve.gateway.upstream.connection import KEEPALIVE_S, Connections, is_local, request_head

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import SecretStr

    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import GatewaySettings, RoutingSettings
    from ep_serve.gateway.upstream.circuit import Outcome

logger = logging.getLogger(__name__)

UNHEALTHY_AFTER = 2
"""Failed health checks in a row."""
MAX_LAG_S = 0.5
"""How late the event loop may be with a health check whose time-out counts."""
BUSY = frozenset({429, 503})
"""Statuses of an engine that takes no more requests for now."""
MAX_BODY = 2**20
"""Bytes of a list of models, or of the answer to a trial request."""
SAME_BREAK_S = 2.0
"""Requests that an engine drops within this time of each other were ended by one break."""

_breaks = itertools.count()


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
        self.circuit = Circuit(settings)
        self._healthy = False
        self._failed_checks = 0
        self._break = 0
        self._broke_at = float("-inf")

    @property
    def available(self) -> bool:
        """Whether it may get a request: healthy, and its circuit is closed."""
        return self.healthy and not self.circuit.open

    @property
    def healthy(self) -> bool:
        return self._healthy and not self.retired

    @property
    def full(self) -> bool:
        return self.active >= self._settings.concurrency

    def serves(self, model: str) -> bool:
        return self.models is None or model in self.models

    def chat_head(self, headers: dict[str, str], length: int) -> bytes:
        """The head of a chat request with a body of `length` bytes."""
        return request_head(self._chat, {**self._headers, **headers}, length)

    def begin(self, work: float) -> None:
        self.active += 1
        self.work += work

    def end(self, work: float, outcome: Outcome | None) -> None:
        """Finish a request; `outcome` is None if it says nothing about the engine."""
        self.active -= 1
        self.work = self.work - work if self.active else 0.0
        if outcome is not None:
            self.circuit.count(outcome)

    def silent_for(self, seconds: float) -> bool:
        """Whether nobody received a piece of an answer from it for that long."""
        return asyncio.get_running_loop().time() - self.connections.heard_at >= seconds

    def broke(self) -> int:
        """Note that it dropped a request; the number is the same for all that one break ended."""
        now = time.monotonic()
        if now - self._broke_at > SAME_BREAK_S:
            self._break = next(_breaks)
        self._broke_at = now
        return self._break

    def checked(self, healthy: bool) -> None:
        """Note a health check."""
        self._failed_checks = 0 if healthy else self._failed_checks + 1
        if healthy and not self._healthy:  # perhaps another process than before
            self.circuit.hurry()
            self._broke_at = float("-inf")
        if healthy or self._failed_checks >= UNHEALTHY_AFTER:
            self._healthy = healthy

    def found_dead(self) -> None:
        """Note that it says itself, after a request failed, that it cannot work."""
        self._healthy = False


class Upstreams:
    """All engines, found by name and watched.

    `changed` is called when an engine that could not get requests can get them again.
    """

    def __init__(self, settings: GatewaySettings, metrics: Metrics) -> None:
        self._settings = settings.routing
        self._metrics = metrics
        self._bases = [URL(str(url)) for url in settings.upstreams]
        self._known: dict[tuple[URL, str], Upstream] = {}
        self._key = settings.upstream_api_key
        self._session: aiohttp.ClientSession | None = None
        self._trials: dict[Upstream, asyncio.Task[None]] = {}
        self._inquiries: dict[Upstream, asyncio.Task[bool]] = {}
        self.changed: Callable[[], None] = lambda: None

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
        tasks = [*self._trials.values(), *self._inquiries.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
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
        """Ask every engine how it is and which models it serves; try those in doubt."""
        await asyncio.gather(*(self._check(upstream) for upstream in self.all))

    def inquire(self, upstream: Upstream) -> asyncio.Future[bool]:
        """Ask an engine that failed a request whether it can work at all; true if it cannot.

        Requests that fail together share the question. No answer is no evidence.
        """
        task = self._inquiries.get(upstream)
        if task is None:
            task = asyncio.create_task(self._inquire(upstream))
            self._inquiries[upstream] = task
            task.add_done_callback(lambda _: self._inquiries.pop(upstream, None))
        return asyncio.shield(task)

    async def _inquire(self, upstream: Upstream) -> bool:
        try:
            async with asyncio.timeout(self._settings.health_timeout_s):
                dead = not await self._health(upstream)
        except TimeoutError:
            return False
        except (aiohttp.ClientError, OSError) as error:
            dead = not is_local(error)
        if dead:
            upstream.found_dead()
            self._note(upstream, "down")
        return dead

    async def _health(self, upstream: Upstream) -> bool:
        url = upstream.url / "health"
        async with self.session.get(url, **request_options(upstream)) as answer:
            return answer.status == 200

    async def _check(self, upstream: Upstream) -> None:
        before, available = upstream.healthy, upstream.available
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
        upstream.checked(healthy)
        if before != upstream.healthy:
            self._note(upstream, "up" if upstream.healthy else f"down, {reason}")
        due = upstream.healthy and upstream.circuit.needs_trial
        if due and upstream not in self._trials:
            task = asyncio.create_task(self._try(upstream))
            self._trials[upstream] = task
            task.add_done_callback(lambda _: self._trials.pop(upstream, None))
        self._show(upstream)
        if upstream.available and not available:
            self.changed()

    def _is_own_fault(self, error: Exception, since: float) -> bool:
        """Whether this process, not the engine, was short of sockets or of time."""
        if isinstance(error, TimeoutError):
            late = asyncio.get_running_loop().time() - since
            return late > self._settings.health_timeout_s + MAX_LAG_S
        return is_local(error)

    async def _models(self, upstream: Upstream) -> dict[str, dict[str, Any]] | None:
        """Its models by name; None if it does not tell."""
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

    async def _try(self, upstream: Upstream) -> None:
        """Find out with a small request whether an engine works."""
        patience = self._settings.first_byte_timeout_s
        request: dict[str, Any] = {
            "messages": [{"role": "user", "content": "Hello"}],
            "max_tokens": 1,
        }
        if upstream.models:
            request["model"] = next(iter(upstream.models))
        works: bool | None = False
        url = upstream.url / "v1" / "chat" / "completions"
        try:
            async with asyncio.timeout(patience):
                async with self.session.post(
                    url, json=request, **request_options(upstream)
                ) as answer:
                    await _body(answer)
                    # A refusal is an answer: the request may not suit a server that works.
                    works = None if answer.status in BUSY else answer.status < 500
        except TimeoutError:
            works = False if upstream.silent_for(patience) else None
        except (aiohttp.ClientError, OSError, ValueError):
            pass
        available = upstream.available
        upstream.circuit.tried(works)
        logger.warning("trial request", extra={"upstream": upstream.name, "works": works})
        self._show(upstream)
        if upstream.available and not available:
            self.changed()

    def _note(self, upstream: Upstream, state: str) -> None:
        logger.warning("engine %s", state, extra={"upstream": upstream.name})

    def _show(self, upstream: Upstream) -> None:
        if not upstream.retired:
            self._metrics.upstream_up.labels(upstream.name).set(upstream.available)
            self._metrics.upstream_work.labels(upstream.name).set(upstream.active)

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


async def _body(answer: aiohttp.ClientResponse) -> bytes:
    """All of a small body.

    Raises:
        ValueError: it is larger than `MAX_BODY`.
    """
    body = bytearray()
    async for chunk in answer.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY:
            raise ValueError(f"a body of more than {MAX_BODY} bytes")
    return bytes(body)


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
