"""Fetch media from client URLs.

Addresses are checked when the socket is created (`TCPConnector.socket_factory`), so that DNS
rebinding cannot change the address between check and connection.
"""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.fetch.addresses import check_url, is_allowed, refused, unreachable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.http import RawResponseMessage
    from aiohttp.streams import StreamReader

    from ep_serve.gateway.settings import MediaSettings

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK = 256 * 1024
IDLE_TIMEOUT_S = 10.0
"""Longest pause of a server; time beyond what its bytes take at `MIN_BYTES_PER_S` is a pause."""
MIN_BYTES_PER_S = 64 * 1024
MAX_INTERIM = 16
"""Responses with a status of 1xx before the final one."""
MAX_OVERHEAD = 64 * 1024
"""Bytes of heads and chunk framing, in addition to the size of the content."""
_SLICE = 16 * 1024


class _ForbiddenAddressError(OSError):
    """The host resolved to a forbidden address."""


class _TimeBudget:
    """Limits the total time inside its blocks; raises `TimeoutError` when it is used up."""

    def __init__(self) -> None:
        self._left = IDLE_TIMEOUT_S
        self._timeout = asyncio.timeout(None)
        self._since = 0.0

    def credit(self, nbytes: int) -> None:
        """Add time for received bytes."""
        self._left = min(IDLE_TIMEOUT_S, self._left + nbytes / MIN_BYTES_PER_S)

    async def __aenter__(self) -> None:
        self._since = asyncio.get_running_loop().time()
        self._timeout = asyncio.timeout(self._left)
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        self._left -= asyncio.get_running_loop().time() - self._since
        await self._timeout.__aexit__(*error)


class _Handler(ResponseHandler):
    """A connection that is aborted when too little of the received data is content.

    aiohttp limits the size of a head, but neither the number of interim responses (1xx) nor the
    overhead of small chunks.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._heads = 0
        self._received = 0
        self._content: StreamReader | None = None

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data) or 1, _SLICE):  # no data makes the parser continue
            piece = data[start : start + _SLICE]
            self._received += len(piece)
            super().data_received(piece)
            content = 0 if self._content is None else self._content.total_bytes
            # While reading is paused, received data is not parsed.
            overhead = 0 if self._reading_paused else self._received - 2 * content
            if self._heads > MAX_INTERIM or overhead > MAX_OVERHEAD:
                if self.transport is not None:
                    self.transport.abort()
                return

    def feed_data(self, data: tuple[RawResponseMessage, StreamReader], size: int = 0) -> None:
        """Handle a response head."""
        self._heads += 1
        self._content = data[1]
        super().feed_data(data, size)


class _Resolver(AbstractResolver):
    """Resolves host names in a separate thread pool.

    Lookups depend on name servers that a client may control and cannot be cancelled; in the default
    executor a few slow ones would block all other work.
    """

    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, "resolver")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        flags, stream = socket.AI_ADDRCONFIG, socket.SOCK_STREAM
        lookup = partial(socket.getaddrinfo, host, port, family, type=stream, flags=flags)
        infos = await asyncio.get_running_loop().run_in_executor(self._threads, lookup)
        found = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            ResolveResult(
                hostname=host,
                host=str(address[0]),
                port=int(address[1]),
                family=kind,
                proto=protocol,
                flags=found,
            )
            for kind, _, protocol, _, address in infos
        ]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class Fetcher:
    """Fetches media without forwarding anything of the client's request."""

    def __init__(self, settings: MediaSettings, resolver: AbstractResolver | None = None) -> None:
        self._max_bytes = settings.max_bytes
        self._settings = settings.fetch
        # A lookup continues for a while after its request was cancelled.
        self._resolver = resolver or _Resolver(3 * settings.concurrency)
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        connector = aiohttp.TCPConnector(
            limit=0,
            force_close=True,
            use_dns_cache=False,
            resolver=self._resolver,
            socket_factory=self._socket,
        )
        # aiohttp has no public API for it.
        handler: type[ResponseHandler] = _Handler
        connector._factory = partial(handler, loop=asyncio.get_running_loop())
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"accept-encoding": "identity", "user-agent": "ep-serve"},
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=None),  # `fetch` has its own
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        await self._resolver.close()

    async def fetch(self, text: str, write: Callable[[bytes], Awaitable[None]]) -> None:
        """Fetch a URL and pass its content to `write` as it arrives.

        Raises:
            ApiError: 400 for a URL that is not allowed, 413 for too many bytes, 422 if fetching
                fails; and what `write` raises.
        """
        if not self._settings.enabled:
            raise refused("Fetching media is disabled; send a 'data:' URL or a file_id.")
        seconds = self._settings.timeout_s
        try:
            async with asyncio.timeout(seconds) as whole:
                await self._fetch(text, write)
        except TimeoutError:
            if whole.expired():
                raise _failed(f"could not be fetched within {seconds:g} s") from None
            raise _failed("arrives too slowly from its URL") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if _forbidden(error) or isinstance(error, aiohttp.ClientConnectorDNSError):
                raise unreachable() from None
            raise _failed("could not be fetched from its URL") from None

    async def _fetch(self, text: str, write: Callable[[bytes], Awaitable[None]]) -> None:
        assert self._session is not None
        url = check_url(text, self._settings)
        budget = _TimeBudget()
        for _ in range(self._settings.max_redirects + 1):
            async with budget:
                answer = await self._session.get(url, allow_redirects=False)
            async with answer:
                if answer.status not in _REDIRECTS:
                    self._check(answer)
                    received = 0
                    while True:
                        async with budget:
                            chunk = await answer.content.read(_CHUNK)
                        if not chunk:
                            return
                        budget.credit(len(chunk))
                        received += len(chunk)
                        self._check_size(received)
                        await write(chunk)
                url = check_url(str(self._target(url, answer)), self._settings)
        raise refused(f"The URL redirects more than {self._settings.max_redirects} times.")

    @staticmethod
    def _target(url: URL, answer: aiohttp.ClientResponse) -> URL:
        location = answer.headers.get("location")
        if not location:
            raise _failed("redirects without a Location header")
        return url.join(URL(location))

    def _check(self, answer: aiohttp.ClientResponse) -> None:
        if answer.status != 200:
            raise _failed(f"could not be fetched: its server answered {answer.status}")
        if answer.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise _failed("was sent with a Content-Encoding that was not requested")
        if answer.content_length is not None:
            self._check_size(answer.content_length)

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self._max_bytes:
            raise too_large(self._max_bytes)

    def _socket(self, info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        if not is_allowed(str(address[0]), self._settings.allow_networks):
            raise _ForbiddenAddressError("forbidden address")
        made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        return made


def too_large(limit: int) -> ApiError:
    """413 for a medium with too many bytes."""
    return ApiError(
        413, f"A medium may have at most {limit} bytes.", code="media_too_large", param="messages"
    )


def _failed(what: str) -> ApiError:
    return ApiError(422, f"The medium {what}.", code="media_not_fetched", param="messages")


def _forbidden(error: BaseException) -> bool:
    """Return whether a forbidden address caused an error or one of an exception group."""
    seen: list[BaseException | None] = [error]
    while seen:
        item = seen.pop()
        if isinstance(item, _ForbiddenAddressError):
            return True
        if isinstance(item, BaseExceptionGroup):
            seen.extend(item.exceptions)
        elif item is not None:
            seen += [item.__cause__, item.__context__, getattr(item, "os_error", None)]
    return False
