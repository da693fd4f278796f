"""What happens to the bytes of a stream between an engine and a client."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web

from tests.gateway.conftest import MakeWorld
from tests.gateway.mock_upstream import MODEL, MockUpstream
from tests.gateway.test_api import check_error

pytestmark = pytest.mark.anyio

DONE = b"data: [DONE]\n\n"
PIECE = b'data: {"choices":[{"delta":{"content":"' + b"x" * 65_536 + b'"}}]}\n\n'


@dataclass
class Scripted(MockUpstream):
    """An engine that streams these bytes, piece by piece; or large pieces without end."""

    pieces: list[bytes] = field(default_factory=list)
    endless: bool = False
    sent: int = 0

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in self.pieces:
            await response.write(piece)
            await asyncio.sleep(0.01)
        while self.endless:
            await response.write(PIECE)
            self.sent += len(PIECE)
        return response


@pytest.mark.parametrize(
    "pieces",
    [
        [b'data: {"a": 1}\n\n', b'data: {"b": "\xc3\xa9"}\n\n', DONE],
        [b'data: {"a": 1}\n\ndata: {"b"', b': "\xc3', b'\xa9"}\n', b"\ndata: [DO", b"NE]\n\n"],
        [b': a comment\n\nevent: x\nid: 7\ndata: {"a":\ndata: 1}\n\n' + DONE],
        [b'data: {"a": "' + b"x" * 300_000 + b'"}\n\n', DONE],
    ],
)
async def test_a_stream_is_passed_on_byte_by_byte(world: MakeWorld, pieces: list[bytes]) -> None:
    async with world([Scripted(pieces=pieces)]) as w, w.stream() as response:
        assert await response.aread() == b"".join(pieces)


async def test_a_refusal_inside_a_stream_is_a_refusal(world: MakeWorld) -> None:
    error = {"message": "top_logprobs must be at most 20.", "param": "top_logprobs", "code": 400}
    pieces = [b"data: " + json.dumps({"error": error}).encode() + b"\n\n", DONE]
    engine = Scripted(pieces=pieces)
    async with world([engine], routing={"breaker_failures": 3}) as w:
        for _ in range(4):  # the engine is not at fault: it stays in service
            answer = await w.ask(stream=True)
            check_error(answer, 400)
            assert answer.json()["error"]["message"] == error["message"]
            assert answer.json()["error"]["param"] == "top_logprobs"
        assert len(engine.requests) == 4
        engine.pieces = [b'data: {"error": {"code": 500, "message": "/secret"}}\n\n', DONE]
        check_error(await w.ask(stream=True), 502, "upstream_error")


async def unread(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request for a stream that nobody reads yet."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**16)
    messages = [{"role": "user", "content": "x"}]
    body = json.dumps({"model": MODEL, "stream": True, "messages": messages}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n"
    writer.write(head.encode() + b"content-type: application/json\r\n\r\n" + body)
    return reader, writer


async def is_left(engine: Scripted) -> bool:
    """Whether an engine soon has nothing to do."""
    for _ in range(150):
        if engine.requests and not engine.running:
            return True
        await asyncio.sleep(0.1)
    return False


async def test_a_client_that_does_not_read_makes_the_engine_wait(world: MakeWorld) -> None:
    engine = Scripted(endless=True)
    async with world([engine], routing={"idle_timeout_s": 30}) as w:
        reader, writer = await unread(w.now.port)
        before = -1
        while engine.sent != before:
            before = engine.sent
            await asyncio.sleep(0.5)
        assert 0 < engine.sent < 2**26  # what the kernel holds for two connections, too
        while engine.sent == before:
            assert await reader.read(2**16)
        writer.close()
        assert await is_left(engine)


@pytest.mark.parametrize(
    "settings", [{"request_timeout_s": 1}, {"routing": {"idle_timeout_s": 0.5}}]
)
async def test_a_client_that_never_reads_is_disconnected_and_the_engine_is_not_blamed(
    world: MakeWorld, settings: dict[str, Any]
) -> None:
    engine = Scripted(endless=True)
    async with world([engine], **settings) as w:
        _, writer = await unread(w.now.port)
        assert await is_left(engine)
        writer.close()
        (failures,) = w.gateway.metrics.upstream_failures.collect()
        assert not failures.samples
