"""Low-overhead load generator of streamed chat completions, for `bench_gateway.py`."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import httptools

_TOKEN = b'"content":"t'
_START = b"data:"


@dataclass
class Round:
    """Measurements of one round; only streams and tokens inside of the window count."""

    window: tuple[float, float]
    first: list[float] = field(default_factory=list)
    """Seconds until the first event of each stream."""
    tokens: int = 0
    all_tokens: int = 0
    """Tokens including those outside of the window."""
    failed: int = 0

    @property
    def share(self) -> float:
        """Share of the tokens inside of the window."""
        return self.tokens / max(1, self.all_tokens)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / (self.window[1] - self.window[0])


def quantile(seconds: list[float], share: float) -> float:
    """Milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return float("nan")
    return 1_000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


class _Stream(asyncio.Protocol):
    """A keep-alive connection for consecutive requests."""

    def __init__(self, round_: Round) -> None:
        self._round = round_
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._done: asyncio.Future[bool] | None = None
        self._sent_at = 0.0
        self._tokens = 0
        self._waiting = True
        self._tail = b""
        self.transport: Any = None

    def send(self, request: bytes) -> asyncio.Future[bool]:
        """Send a request; the future tells whether the connection is reusable."""
        self._done = self._loop.create_future()
        self._sent_at, self._tokens, self._waiting, self._tail = time.perf_counter(), 0, True, b""
        self.transport.write(request)
        return self._done

    @property
    def tokens(self) -> int:
        return self._tokens

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(False)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.transport.abort()

    def on_body(self, body: bytes) -> None:
        now = time.perf_counter()
        begin, end = self._round.window
        if self._waiting and _START in body and self._parser.get_status_code() == 200:
            self._waiting = False
            if begin <= self._sent_at < end:
                self._round.first.append(now - self._sent_at)
        found = self._tail + body
        count = found.count(_TOKEN)
        self._tail = found[-(len(_TOKEN) - 1) :]
        self._tokens += count
        self._round.all_tokens += count
        if begin <= now < end:
            self._round.tokens += count

    def on_message_complete(self) -> None:
        self._end(self._parser.should_keep_alive())

    def _end(self, reusable: bool) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_result(reusable)


async def load(
    port: int,
    body: dict[str, Any],
    key: str,
    streams: int,
    tokens: int,
    window: tuple[float, float],
    period_s: float,
) -> Round:
    """Keep up to `streams` streams of `tokens` tokens open.

    Args:
        port: where the target listens, on 127.0.0.1.
        body: of each request.
        key: sent as the API key.
        streams: number of workers; their starts are spread over the time before the window.
        tokens: expected tokens; other answers count as failed.
        window: seconds from now until it begins, and its length.
        period_s: minimum seconds between the requests of a worker.
    """
    data = json.dumps(body).encode()
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nauthorization: Bearer %b\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
        % (port, key.encode(), len(data), data)
    )
    now = time.perf_counter()
    begin = now + window[0]
    round_ = Round((begin, begin + window[1]))

    async def worker(due: float) -> None:
        stream: _Stream | None = None
        while max(due, time.perf_counter()) < round_.window[1]:
            await asyncio.sleep(due - time.perf_counter())
            due = max(due, time.perf_counter()) + period_s
            if stream is None or stream.transport.is_closing():
                _, stream = await asyncio.get_running_loop().create_connection(
                    lambda: _Stream(round_), "127.0.0.1", port
                )
            reusable = await stream.send(request)
            round_.failed += stream.tokens != tokens
            if not reusable:
                stream.transport.abort()
                stream = None
        if stream is not None:
            stream.transport.close()

    await asyncio.gather(*(worker(now + window[0] * number / streams) for number in range(streams)))
    return round_
