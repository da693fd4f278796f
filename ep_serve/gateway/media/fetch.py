"""Fetching a medium from a URL that a client gave.

The address is checked where the socket is made (`TCPConnector.socket_factory`), so that the checked
address is the one connected to, whatever the name service says a moment later.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import aiohttp
from yarl import URL

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.addresses import check_url, is_allowed, refused, unreachable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aiohttp.abc import AbstractResolver

    from ep_serve.gateway.settings import MediaSettings

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_CHUNK = 256 * 1024


class _ForbiddenAddressError(OSError):
    """The name resolved to an address that is not fetched from."""


class Fetcher:
    """Fetches media; nothing of the client's request travels along."""

    def __init__(self, settings: MediaSettings, resolver: AbstractResolver | None = None) -> None:
        self._max_bytes = settings.max_bytes
        self._settings = settings.fetch
        self._resolver = resolver
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        connector = aiohttp.TCPConnector(
            limit=0,
            force_close=True,
            use_dns_cache=False,
            resolver=self._resolver,
            socket_factory=self._socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"accept-encoding": "identity", "user-agent": "ep-serve"},
            auto_decompress=False,
            trust_env=False,
            timeout=aiohttp.ClientTimeout(total=self._settings.timeout_s),
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def chunks(self, text: str) -> AsyncGenerator[bytes]:
        """The bytes behind a URL, as they arrive; to be closed by whoever stops reading early.

        Raises:
            ApiError: 400 for a URL that is not fetched, 413 for more bytes than allowed, 422 if the
                medium cannot be had.
        """
        if not self._settings.enabled:
            raise refused("Media are not fetched here; send a 'data:' URL or a file_id.")
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                async with aclosing(self._chunks(text)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        except TimeoutError:
            raise _failed(f"was not there after {self._settings.timeout_s:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if _forbidden(error) or isinstance(error, aiohttp.ClientConnectorDNSError):
                raise unreachable() from None
            raise _failed("could not be fetched from its URL") from None

    async def _chunks(self, text: str) -> AsyncGenerator[bytes]:
        assert self._session is not None
        url = check_url(text, self._settings)
        for _ in range(self._settings.max_redirects + 1):
            async with self._session.get(url, allow_redirects=False) as answer:
                if answer.status not in _REDIRECTS:
                    self._check(answer)
                    received = 0
                    async for chunk in answer.content.iter_chunked(_CHUNK):
                        received += len(chunk)
                        self._check_size(received)
                        yield chunk
                    return
                url = check_url(str(self._target(url, answer)), self._settings)
        raise refused(f"The URL redirects more than {self._settings.max_redirects} times.")

    @staticmethod
    def _target(url: URL, answer: aiohttp.ClientResponse) -> URL:
        location = answer.headers.get("location")
        if not location:
            raise _failed("redirects to nowhere")
        return url.join(URL(location))

    def _check(self, answer: aiohttp.ClientResponse) -> None:
        if answer.status != 200:
            raise _failed(f"could not be fetched: its server answered {answer.status}")
        if answer.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise _failed("was sent compressed, which was not asked for")
        if answer.content_length is not None:
            self._check_size(answer.content_length)

    def _check_size(self, nbytes: int) -> None:
        if nbytes > self._max_bytes:
            raise too_large(self._max_bytes)

    def _socket(self, info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        if not is_allowed(str(address[0]), self._settings.allow_networks):
            raise _ForbiddenAddressError("not an address to fetch from")
        made = socket.socket(family, kind, protocol)
        made.setblocking(False)
        return made


def too_large(limit: int) -> ApiError:
    """413: more bytes than a medium may have."""
    return ApiError(
        413, f"A medium may have {limit} bytes.", code="media_too_large", param="messages"
    )


def _failed(what: str) -> ApiError:
    return ApiError(422, f"The medium {what}.", code="media_not_fetched", param="messages")


def _forbidden(error: BaseException) -> bool:
    """Whether a refused address is behind an error, or in a group of them."""
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
