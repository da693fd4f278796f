"""The mock engines and the host of media behind the gateway that `flood_gateway.py` attacks."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import uvloop
from aiohttp import web

from tests.gateway.mock_upstream import MockUpstream

ENGINES = 2
TARPIT_HOST = "127.0.0.2"
_TOKEN = {"token": "abc", "logprob": -1.0, "bytes": [97, 98, 99], "top_logprobs": []}
LARGE_ANSWER = json.dumps(
    {
        "choices": [{"message": {"content": "x"}, "logprobs": {"content": [_TOKEN] * 400_000}}],
        "usage": {"completion_tokens": 5},
    }
).encode()
"""About 30 MB, as log probabilities can have."""


class Engine(MockUpstream):
    """A mock engine whose behavior depends on the prompt."""

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        content = body["messages"][-1]["content"]
        if content == "poison":
            return web.json_response({"error": {"message": "poison"}}, status=500)
        if content == "killer":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if content == "large":
            return web.Response(body=LARGE_ANSWER, content_type="application/json")
        if content == "slowly":
            await asyncio.sleep(2)
        if content == "much":
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            event = b'data: {"choices": [], "logprobs": "%b"}\n\n' % (b"x" * 5_000)
            while True:  # more than an engine does for 200 streams at once
                await response.write(event)
                await asyncio.sleep(0.02)
        self.requests.clear()
        self.headers.clear()
        return await super()._answer(request, body)


def serve_upstreams(ports: Any) -> None:
    """Run mock engines and a tarpit, and send their ports through the pipe."""
    with suppress(KeyboardInterrupt):
        uvloop.run(_serve_upstreams(ports))


async def _serve_upstreams(ports: Any) -> None:
    engines = [Engine() for _ in range(ENGINES)]
    for engine in engines:
        await engine.start()

    tarpit = await asyncio.start_server(_answer_never, TARPIT_HOST, 0, backlog=1_024)
    ports.send(([engine.port for engine in engines], tarpit.sockets[0].getsockname()[1]))
    await asyncio.Event().wait()


async def _answer_never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer nothing, or at `/interim` nothing but interim responses."""
    with suppress(ConnectionError):
        if (await reader.readline()).startswith(b"GET /interim "):
            while True:
                writer.write(b"HTTP/1.1 103 Early Hints\r\na: b\r\n\r\n" * 1_000)
                await writer.drain()
        await reader.read()
    writer.close()
