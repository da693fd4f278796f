"""A download that nobody reads to its end is closed at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from ep_serve.gateway.media.fetch.fetcher import Fetcher
from ep_serve.gateway.media.store.shared import SharedStore
from ep_serve.gateway.settings import MediaSettings
from tests.gateway.test_media import fetching, origin


class Download:
    """Endless bytes; says whether it was closed."""

    def __init__(self) -> None:
        self.closed = False

    async def chunks(self, name: str) -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"bytes"
        finally:
            self.closed = True


async def refuse(*args: Any) -> None:
    raise LookupError("no room")


@asynccontextmanager
async def context(*args: Any) -> AsyncIterator[Any]:
    """Stands for a lock and an upload that has no room."""
    yield SimpleNamespace(write=refuse)


async def missing(*args: Any) -> bool:
    return False


def test_a_copy_that_cannot_be_kept_closes_its_download() -> None:
    async def run() -> bool:
        download = Download()
        threads = SimpleNamespace(run_serialized=missing)
        parts: Any = SimpleNamespace(
            _blob_lock=context, path=lambda digest: SimpleNamespace(is_file=None), threads=threads
        )
        parts.receive, parts._bucket = context, download
        with pytest.raises(LookupError, match="no room") as kept:  # with its frames
            await SharedStore._copy(parts, "digest", "")
        assert kept.value
        return download.closed

    assert asyncio.run(run())


def test_a_cancelled_download_closes_its_connection() -> None:
    async def run() -> None:
        closed = asyncio.Event()

        async def endless(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            try:
                while True:
                    await response.write(bytes(1_000))
                    await asyncio.sleep(0.01)
            finally:
                closed.set()

        async with origin(endless) as (url, port, _):
            fetcher = Fetcher(MediaSettings(**fetching(port)))
            await fetcher.open()
            with pytest.raises(LookupError, match="no room") as kept:
                await fetcher.fetch(url, refuse)
            assert kept.value
            async with asyncio.timeout(20):
                await closed.wait()
            await fetcher.close()

    asyncio.run(run())
