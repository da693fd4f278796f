"""A mock engine with minimal CPU use, for `bench_gateway.py`.

    python scripts/mock_engine.py PORT [--tokens N] [--interval SECONDS]

It answers every chat request with the same stream at a fixed rate: token `n` is due `n` intervals
after the first one, and each token is a separate chunk. With interval 0 one token of each stream is
sent per event loop iteration.

It uses asyncio protocols: with an HTTP framework it would need more CPU time than the proxies that
are measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from functools import partial
from typing import Any

import httptools
import uvloop

MODEL = "mock"
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n%b\r\n\r\n"
_STREAM_HEAD = _HEAD % (b"text/event-stream; charset=utf-8", b"transfer-encoding: chunked")
_MODELS = {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1}]}


def chunk(event: bytes) -> bytes:
    """Encode an event as an HTTP chunk."""
    data = b"data: " + event + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(number: int) -> bytes:
    """Encode a token as vLLM does."""
    choice = {"index": 0, "delta": {"content": f"t{number} "}, "finish_reason": None}
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return chunk(json.dumps({**head, "choices": [choice]}, separators=(",", ":")).encode())


class Connection(asyncio.Protocol):
    """A connection that sends the stream."""

    def __init__(self, tokens: list[bytes], interval: float) -> None:
        self._tokens = tokens
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: Any = None
        self._next: asyncio.Handle | None = None
        self._url = b""
        self._number = 0
        self._began = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._next is not None:
            self._next.cancel()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_message_complete(self) -> None:
        if self._parser.get_method() == b"POST":
            self._number, self._began = 0, self._loop.time()
            self._transport.write(_STREAM_HEAD + self._tokens[0])
            self._wait()
            return
        body = json.dumps(_MODELS if self._url.endswith(b"/models") else {}).encode()
        length = b"content-length: %d" % len(body)
        self._transport.write(_HEAD % (b"application/json", length) + body)

    def _wait(self) -> None:
        self._number += 1
        if self._interval:
            due = self._began + self._number * self._interval
            self._next = self._loop.call_at(due, self._send)
        else:
            self._next = self._loop.call_soon(self._send)

    def _send(self) -> None:
        if self._number < len(self._tokens):
            self._transport.write(self._tokens[self._number])
            self._wait()
        else:
            self._next = None
            self._transport.write(chunk(b"[DONE]") + b"0\r\n\r\n")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--interval", type=float, default=0.025)
    given = parser.parse_args()
    tokens = [token(number) for number in range(given.tokens)]
    make = partial(Connection, tokens, given.interval)
    server = await asyncio.get_running_loop().create_server(
        make, "127.0.0.1", given.port, backlog=1_024
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
