"""The attacks of `flood_gateway.py`.

An attack is a coroutine that takes a `Target` and runs until it is cancelled.
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
import resource
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from multiprocessing.synchronize import Event
from typing import Any

import aiohttp
import uvloop
from flood_upstreams import TARPIT_HOST

from tests.clips import make_image
from tests.gateway.mock_upstream import MODEL

MIB = 2**20
BATCH = 64 * 2**10
"""Bytes that a flood sends in one write."""


@dataclass(frozen=True)
class Target:
    """The gateway that is attacked."""

    port: int
    tarpit_port: int
    key: str | None

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def head(self, line: str, *more: str) -> bytes:
        """Return an HTTP/1.1 head without its final empty line."""
        auth = [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([f"{line} HTTP/1.1", "Host: a", *auth, *more, ""]).encode()

    def chat_head(self, *more: str) -> bytes:
        return self.head("POST /v1/chat/completions", "Content-Type: application/json", *more)


class Keys(Enum):
    """Whether an attack runs without a key, with one, or both."""

    WITHOUT = (False,)
    WITH = (True,)
    BOTH = (False, True)


@dataclass(frozen=True)
class Attack:
    name: str
    keys: Keys
    media: bool
    """Whether it attacks media: requests of the other tenant then contain an image."""
    run: Callable[[Target], Awaitable[None]]


ATTACKS: dict[str, Attack] = {}
_started: list[Event] = []


def attack(
    name: str, keys: Keys = Keys.BOTH, *, media: bool = False
) -> Callable[[Callable[[Target], Coroutine[Any, Any, None]]], None]:
    def add(run: Callable[[Target], Coroutine[Any, Any, None]]) -> None:
        ATTACKS[run.__name__] = Attack(name, keys, media, run)

    return add


def attack_forever(name: str, target: Target, started: Event) -> None:
    """Run an attack in the attacker's process."""
    _started.append(started)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))
    with suppress(KeyboardInterrupt):
        uvloop.run(ATTACKS[name].run(target))  # type: ignore[arg-type]


# -- connections ------------------------------------------------------------------------------


async def run_concurrently(
    count: int, work: Callable[[], Coroutine[Any, Any, Any]], pause_s: float = 0.0
) -> None:
    """Run `count` loops of `work` concurrently."""
    for event in _started:
        event.set()

    async def again() -> None:
        await asyncio.sleep(random.uniform(0, pause_s))
        while True:
            with suppress(OSError, aiohttp.ClientError, asyncio.IncompleteReadError):
                await work()
            await asyncio.sleep(pause_s)

    await asyncio.gather(*(again() for _ in range(count)))


async def send(target: Target, *pieces: bytes, repeat: bytes = b"", read: bool = True) -> None:
    """Send pieces on a new connection, then `repeat` until it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port, limit=MIB)
    if not read:
        writer.transport.pause_reading()  # type: ignore[attr-defined]

    async def read_all() -> None:
        while await reader.read(MIB):
            pass

    reading = asyncio.create_task(read_all())
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        while repeat and not (read and reading.done()):
            writer.write(repeat)
            await writer.drain()
        await reading if read else await asyncio.sleep(3_600)
    finally:
        reading.cancel()
        writer.close()


async def trickle(target: Target, head: bytes, piece: bytes, pause_s: float) -> None:
    """Send a head, then a piece after each pause until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        writer.write(head)
        while not reader.at_eof():
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(BATCH), pause_s)
            writer.write(piece)
            await writer.drain()
    finally:
        writer.close()


def chat(content: Any, **fields: Any) -> bytes:
    message = {"role": "user", "content": content}
    return json.dumps({"model": MODEL, "messages": [message], **fields}).encode()


def picture(number: int) -> list[dict[str, Any]]:
    """Return message content with a small image, different for each number."""
    data = base64.b64encode(make_image(number=number)).decode()
    return [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]


async def post(target: Target, body: bytes, path: str = "/v1/chat/completions") -> None:
    """Send a request on a new connection and read the response."""
    headers = {"content-type": "application/json", "connection": "close", **target.headers}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(target.url + path, data=body) as answer,
    ):
        await answer.read()


# -- HTTP -------------------------------------------------------------------------------------


@attack("Pipelined requests")
async def pipelining(target: Target) -> None:
    request = target.head("GET /v1/models" if target.key else "GET /health") + b"\r\n"
    await run_concurrently(8, lambda: send(target, repeat=request * (BATCH // len(request))))


@attack("Pipelined requests, answers not read")
async def unread_answers(target: Target) -> None:
    request = target.head("GET /v1/models" if target.key else "GET /health") + b"\r\n"
    await run_concurrently(500, lambda: send(target, repeat=request * 8, read=False))


@attack("Heads without end")
async def endless_heads(target: Target) -> None:
    await run_concurrently(
        64, lambda: send(target, target.head("GET /health") + b"X: ", repeat=b"a" * BATCH)
    )


@attack("Heads without end while an answer runs", Keys.WITH)
async def endless_heads_behind_answers(target: Target) -> None:
    body = chat("slowly", stream=True)
    first = target.chat_head(f"Content-Length: {len(body)}") + b"\r\n" + body
    await run_concurrently(
        64, lambda: send(target, first, b"GET /health HTTP/1.1\r\nX: ", repeat=b"a" * BATCH)
    )


@attack("Trailers without end")
async def endless_trailers(target: Target) -> None:
    start = target.chat_head("Transfer-Encoding: chunked") + b"\r\n2\r\n{}\r\n0\r\n"
    await run_concurrently(
        64, lambda: send(target, start, repeat=b"X: aaaaaaaaaa\r\n" * (BATCH // 16))
    )


@attack("Chunk extensions without end")
async def endless_extensions(target: Target) -> None:
    start = target.chat_head("Transfer-Encoding: chunked") + b"\r\n2;"
    await run_concurrently(64, lambda: send(target, start, repeat=b"a" * BATCH))


@attack("Silent connections", Keys.WITHOUT)
async def silent(target: Target) -> None:
    await run_concurrently(5_000, lambda: send(target), pause_s=3)


@attack("Heads of 32 kB that are never complete", Keys.WITHOUT)
async def half_heads(target: Target) -> None:
    head = target.head("GET /health", *(f"X-{n}: {'a' * 240}" for n in range(120)))
    await run_concurrently(5_000, lambda: trickle(target, head, b"", 5), pause_s=3)


@attack("Connections that are kept alive", Keys.WITHOUT)
async def kept_alive(target: Target) -> None:
    await run_concurrently(
        5_000, lambda: send(target, target.head("GET /health") + b"\r\n"), pause_s=3
    )


@attack("New connections without a pause", Keys.WITHOUT)
async def reconnecting(target: Target) -> None:
    async def once() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", target.port)
        writer.write(b"\x16\x03\x01 nonsense\r\n\r\n")
        writer.close()

    await run_concurrently(64, once)


@attack("Keys that do not exist", Keys.WITHOUT)
async def invented_keys(target: Target) -> None:
    async def discard(reader: asyncio.StreamReader) -> None:
        while await reader.read(MIB):
            pass

    async def once() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
        reading = asyncio.create_task(discard(reader))
        try:
            while not reading.done():
                for _ in range(8):
                    key = f"Authorization: Bearer {random.randrange(10**12)}"
                    writer.write(target.head("GET /v1/models", key) + b"\r\n")
                await writer.drain()
                await asyncio.sleep(0.01)
        finally:
            reading.cancel()
            writer.close()

    await run_concurrently(1_000, once)


# -- bodies -----------------------------------------------------------------------------------


@attack("Slow bodies")
async def slow_bodies(target: Target) -> None:
    head = target.chat_head(f"Content-Length: {40 * MIB}") + b"\r\n" + b" " * 100_000
    await run_concurrently(1_000, lambda: trickle(target, head, b" " * 20_000, 1), pause_s=1)


@attack("Large bodies at once")
async def large_bodies(target: Target) -> None:
    body = chat("a" * (40 * MIB))
    await run_concurrently(16, lambda: post(target, body))


@attack("JSON of many values")
async def json_values(target: Target) -> None:
    body = b'{"model": "mock", "messages": [' + b"[]," * (15 * MIB) + b"[]]}"
    await run_concurrently(4, lambda: post(target, body))


@attack("JSON that is nested deeply")
async def json_depth(target: Target) -> None:
    body = b'{"model": "mock", "messages": ' + b"[" * (20 * MIB) + b"]" * (20 * MIB) + b"}"
    await run_concurrently(4, lambda: post(target, body))


@attack("JSON of many fields")
async def json_fields(target: Target) -> None:
    fields = b",".join(b'"%x": 0' % number for number in range(3_500_000))
    await run_concurrently(4, lambda: post(target, b"{" + fields + b"}"))


@attack("Hang-ups at random moments", media=True)
async def hang_ups(target: Target) -> None:
    body = chat(picture(0), stream=True)
    whole = target.chat_head(f"Content-Length: {len(body)}") + b"\r\n" + body

    async def once() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", target.port)
        writer.write(whole[: random.randrange(len(whole) + 1)])
        await asyncio.sleep(random.uniform(0, 0.15))
        writer.close()

    await run_concurrently(64, once)


# -- media ------------------------------------------------------------------------------------


@attack("URLs of a host that never answers", Keys.WITH, media=True)
async def tarpit(target: Target) -> None:
    url = f"http://{TARPIT_HOST}:{target.tarpit_port}/a.mp4"
    await run_concurrently(
        200, lambda: post(target, chat([{"type": "video_url", "video_url": {"url": url}}]))
    )


@attack("URLs of a host that sends interim responses without end", Keys.WITH, media=True)
async def interim_responses(target: Target) -> None:
    url = f"http://{TARPIT_HOST}:{target.tarpit_port}/interim"
    body = chat([{"type": "image_url", "image_url": {"url": url}}])
    await run_concurrently(40, lambda: post(target, body))


@attack("Uploads of junk", media=True)
async def junk_uploads(target: Target) -> None:
    async def once() -> None:
        form = aiohttp.FormData()
        form.add_field("file", random.randbytes(4 * MIB), filename="a.mp4")
        form.add_field("purpose", "vision")
        async with (
            aiohttp.ClientSession(headers=target.headers) as session,
            session.post(f"{target.url}/v1/files", data=form) as answer,
        ):
            await answer.read()

    await run_concurrently(32, once)


@attack("Inlined junk", media=True)
async def inlined_junk(target: Target) -> None:
    url = "data:video/mp4;base64," + base64.b64encode(random.randbytes(8 * MIB)).decode()
    body = chat([{"type": "video_url", "video_url": {"url": url}}])
    await run_concurrently(32, lambda: post(target, body))


@attack("Downloads that are not read", Keys.WITH)
async def unread_downloads(target: Target) -> None:
    form = aiohttp.FormData()
    form.add_field("file", make_image(2_000, 2_000), filename="a.png")
    form.add_field("purpose", "vision")
    async with (
        aiohttp.ClientSession(headers=target.headers) as session,
        session.post(f"{target.url}/v1/files", data=form) as answer,
    ):
        name = (await answer.json())["id"]
    request = target.head(f"GET /v1/files/{name}/content") + b"\r\n"
    await run_concurrently(300, lambda: send(target, repeat=request * 8, read=False))


# -- engines ----------------------------------------------------------------------------------


@attack("Requests that an engine answers with 500", Keys.WITH)
async def poison(target: Target) -> None:
    await run_concurrently(8, lambda: post(target, chat("poison")))


@attack("Requests that break the connection to an engine", Keys.WITH)
async def killer(target: Target) -> None:
    await run_concurrently(8, lambda: post(target, chat("killer")))


@attack("Large answers that are not read", Keys.WITH)
async def unread_answers_of_engines(target: Target) -> None:
    body = chat("large")
    head = target.chat_head(f"Content-Length: {len(body)}")
    await run_concurrently(20, lambda: send(target, head + b"\r\n" + body, read=False))


@attack("Streams that are not read", Keys.WITH)
async def unread_streams(target: Target) -> None:
    body = chat("much", stream=True)
    head = target.chat_head(f"Content-Length: {len(body)}")
    await run_concurrently(200, lambda: send(target, head + b"\r\n" + body, read=False))
