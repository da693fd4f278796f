"""A download that nobody reads to its end is closed at once, and so is its time-out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from ep_serve.gateway.media.fetch import Fetcher
from ep_serve.gateway.media.service import MediaService
from ep_serve.gateway.media.shared import SharedStore
from ep_serve.gateway.settings import MediaSettings


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


@asynccontextmanager
async def context(*args: Any) -> AsyncIterator[Any]:
    """Stands for a span, a lock and an upload that has no room."""

    async def write(data: bytes) -> None:
        raise OSError("no room")

    yield SimpleNamespace(write=write)


async def refuse(*args: Any) -> None:
    raise OSError("no room")


def fetches(download: Download) -> Any:
    parts = SimpleNamespace(
        _tracing=SimpleNamespace(span=context), fetcher=download, receive=refuse
    )
    return MediaService._fetch(parts, SimpleNamespace(url="u"), None, None)  # type: ignore[arg-type]


def copies(download: Download) -> Any:
    missing = SimpleNamespace(is_file=lambda: False)
    parts = SimpleNamespace(
        _alone=context, _path=lambda digest: missing, receive=context, _bucket=download
    )
    return SharedStore._copy(parts, "digest")  # type: ignore[arg-type]


@pytest.mark.parametrize("reads", [fetches, copies])
def test_a_download_that_cannot_be_kept_is_closed(reads: Callable[[Download], Any]) -> None:
    async def run() -> bool:
        download = Download()
        with pytest.raises(OSError, match="no room") as kept:  # with the frames it went through
            await reads(download)
        assert kept.value
        return download.closed

    assert asyncio.run(run())


def test_who_stops_reading_a_url_closes_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> bool:
        download = Download()
        fetcher = Fetcher(MediaSettings())
        monkeypatch.setattr(fetcher, "_chunks", download.chunks)
        async with aclosing(fetcher.chunks("https://example.com/a")) as chunks:
            async for _ in chunks:
                break
        return download.closed

    assert asyncio.run(run())
