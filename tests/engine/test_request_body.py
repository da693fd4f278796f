"""Request bodies and fetched media take no more memory than the server allows."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from vllm.exceptions import GracefulHTTPError

from ep_serve.engine.input import connector
from ep_serve.engine.input.connector import EncodedMediaConnector
from ep_serve.engine.input.request_memory import RequestMemory, Share
from ep_serve.engine.server import patches, request_limits
from ep_serve.engine.server.request_body import COPIES, REQUEST_SHARE
from ep_serve.engine.server.request_limits import RequestLimits
from ep_serve.engine.settings import EngineSettings
from tests.clips import make_wav

LARGEST = 1000
"""Bytes of a body."""
LIMIT = LARGEST * REQUEST_SHARE * COPIES


@pytest.fixture(autouse=True)
def max_n(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_limits, "_max_n", lambda scope: 8)


class Exchange:
    """One request to an application that reads its body, as an ASGI server runs it."""

    def __init__(
        self,
        *chunks: bytes,
        length: int | None = None,
        content_type: bytes = b"text/plain",
        then: Any = None,
    ) -> None:
        headers = [(b"content-type", content_type)]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        self.scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
        last = len(chunks) - 1
        self.incoming: list[dict[str, Any]] = [
            {"type": "http.request", "body": chunk, "more_body": n < last}
            for n, chunk in enumerate(chunks)
        ]
        self.sent: list[dict[str, Any]] = []
        self.unread_when_answered = 0
        self.body: bytes | None = None
        self._then = then

    async def receive(self) -> dict[str, Any]:
        return self.incoming.pop(0) if self.incoming else {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if not self.sent:
            self.unread_when_answered = len(self.incoming)
        self.sent.append(message)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        self.body = body
        if self._then is not None:
            await self._then()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def run(self, memory: RequestMemory) -> int | None:
        await RequestLimits(self.app, memory)(self.scope, self.receive, self.send)
        return self.sent[0]["status"] if self.sent else None

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.sent[1]["body"])["error"]
        return error


def is_free(memory: RequestMemory) -> bool:
    memory.take(memory.limit)
    return True


def test_a_body_arrives_unchanged_and_its_memory_comes_back() -> None:
    memory = RequestMemory(LIMIT)
    exchange = Exchange(b"abc", b"", b"def")
    assert asyncio.run(exchange.run(memory)) == 200
    assert exchange.body == b"abcdef"
    assert is_free(memory)


def test_a_body_over_the_limit_is_refused_by_its_length_before_it_is_read() -> None:
    memory = RequestMemory(LIMIT)
    exchange = Exchange(b"x" * 600, b"x" * 401, length=1001)
    assert asyncio.run(exchange.run(memory)) == 413
    assert exchange.unread_when_answered == 2
    assert exchange.error == {
        "message": "The request body has at least 1001 bytes; the limit is 1000 "
        "(request_memory_gib).",
        "type": "Request Entity Too Large",
        "param": None,
        "code": 413,
    }


def test_a_chunked_body_is_refused_where_it_exceeds_the_limit() -> None:
    memory = RequestMemory(LIMIT)
    exchange = Exchange(*[b"x" * 400] * 5)
    assert asyncio.run(exchange.run(memory)) == 413
    assert exchange.unread_when_answered == 2
    assert exchange.body is None
    assert is_free(memory)


def test_what_is_left_of_a_refused_body_is_read_so_that_its_client_sees_the_answer() -> None:
    exchange = Exchange(*[b"x" * 400] * 5)
    asyncio.run(exchange.run(RequestMemory(LIMIT)))
    assert not exchange.incoming
    assert [message.get("more_body", False) for message in exchange.sent] == [False, True, False]


def test_lists_that_need_more_memory_than_their_text_are_refused() -> None:
    memory = RequestMemory(1 << 20)
    exchange = Exchange(b"[" + b"[]," * 1000 + b"[]]", content_type=b"application/json")
    assert asyncio.run(exchange.run(memory)) == 413
    assert exchange.error["message"].startswith("The request body may have 2002 values; the limit")
    assert is_free(memory)


def test_bodies_at_the_same_time_share_the_memory() -> None:
    memory = RequestMemory(LIMIT)

    async def run() -> list[int | None]:
        release = asyncio.Event()
        first = [Exchange(b"x" * 900, then=release.wait) for _ in range(4)]
        running = [asyncio.create_task(exchange.run(memory)) for exchange in first]
        await asyncio.sleep(0)
        late = Exchange(b"x" * 500)
        statuses = [await late.run(memory)]
        assert "requests hold 18000 bytes of memory, 2500 more would" in late.error["message"]
        assert late.error["type"] == "ServiceUnavailableError"
        assert (b"retry-after", b"1") in late.sent[0]["headers"]
        release.set()
        statuses += await asyncio.gather(*running)
        return [*statuses, await Exchange(b"x" * 500).run(memory)]

    assert asyncio.run(run()) == [503, 200, 200, 200, 200, 200]


def test_memory_that_the_garbage_collector_gives_back_does_not_block_a_request() -> None:
    class Owner:
        def __init__(self) -> None:
            self.cycle = self

    memory = RequestMemory(10)
    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(20):
            share, owner = Share(memory), Owner()
            share.take(1)
            weakref.finalize(owner, share.release)
            del owner
            with suppress(GracefulHTTPError):
                memory.take(11)
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    memory.take(10)


def test_a_client_that_hangs_up_leaves_nothing_behind() -> None:
    memory = RequestMemory(LIMIT)
    exchange = Exchange(b"abc", b"def")
    exchange.incoming.pop()
    assert asyncio.run(exchange.run(memory)) == 200  # the application sees the end
    assert is_free(memory)


def test_an_application_that_fails_leaves_nothing_behind() -> None:
    async def fail() -> None:
        raise RuntimeError("broken")

    memory = RequestMemory(LIMIT)
    with pytest.raises(RuntimeError, match="broken"):
        asyncio.run(Exchange(b"x" * 900, then=fail).run(memory))
    assert is_free(memory)


@contextmanager
def web_server(data: bytes) -> Iterator[str]:
    """Serves a file to whoever asks; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/sound.wav"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_fetched_media_are_counted_for_as_long_as_they_are_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = make_wav(1)
    memory = RequestMemory(len(data) * 3 // 2)
    monkeypatch.setattr(connector, "Share", lambda: Share(memory))
    patches.install()

    async def fetch(url: str) -> None:
        connector = EncodedMediaConnector()
        medium = await connector.fetch_audio_async(url)
        with pytest.raises(GracefulHTTPError, match="request_memory_gib") as error:
            await connector.fetch_audio_async(url)
        assert error.value.http_status == 503
        del medium, error
        gc.collect()
        await connector.fetch_audio_async(url)
        await connector.connection._async_client.close()
        connector.connection._async_client = None

    with web_server(data) as url:
        asyncio.run(fetch(url))
    gc.collect()
    assert is_free(memory)


def test_the_default_limit_of_a_body_is_204_mib() -> None:
    limit = EngineSettings().request_memory_gib * 2**30
    assert int(limit / REQUEST_SHARE / COPIES) >> 20 == 204
