"""A small engine without a model: answers like vLLM's server, at a fixed rate, or misbehaves.

Also a program of its own for the benchmark: `python -m tests.gateway.mock_upstream PORT`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp
from aiohttp import web

from tests.gateway.reductions import made_up

Mode = Literal[
    "ok",
    "hang",
    "error",
    "die_before",
    "die_after_header",
    "die_mid",
    "half_event",
    "error_event",
    "stall",
    "busy",
    "refuse",
    "echo_url",
    "die",
    "core_dies",
]

MODEL = "mock"
POISON = "poison"
FINGERPRINT = "mock-1"


@dataclass
class MockUpstream:
    """One engine. Change `mode` while it runs."""

    tokens: int = 5
    interval_s: float = 0.0
    mode: Mode = "ok"
    poison: Mode = "ok"
    """The mode of requests that contain the text `POISON`."""
    health: int = 200
    redirect: str = ""
    """Where `/health` sends those who ask."""
    models: tuple[str, ...] = (MODEL,)
    gate: asyncio.Event | None = None
    """Streams wait in their middle until it is set."""
    fetch_media: bool = False
    usage: dict[str, Any] = field(default_factory=lambda: {"completion_tokens": 5})
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    media: list[bytes] = field(default_factory=list)
    cancelled: int = 0
    running: int = 0
    port: int = 0
    host: str = "127.0.0.1"
    _runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def start(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await self._runner.setup()
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((self.host, self.port))
        self.port = sock.getsockname()[1]
        await web.SockSite(self._runner, sock, backlog=1024).start()

    async def stop(self) -> None:
        """End at once; connections are cut."""
        await self._cut()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _cut(self) -> None:
        """Cut all connections and take no more, from inside a request too."""
        if self._runner is None:
            return
        for site in list(self._runner.sites):
            await site.stop()
        server = self._runner.server
        for connection in list(server.connections) if server is not None else ():
            transport = connection.transport
            if transport is not None:
                transport.abort()

    async def __aenter__(self) -> MockUpstream:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _health(self, _: web.Request) -> web.Response:
        if self.redirect:
            return web.Response(status=307, headers={"location": self.redirect})
        return web.Response(status=self.health)

    async def _models(self, _: web.Request) -> web.Response:
        entry = {"object": "model", "created": 1, "owned_by": "x", "root": "/secret"}
        data = [{"id": name, **entry} for name in self.models]
        return web.json_response({"object": "list", "data": data})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.running += 1
        try:
            return await self._answer(request, body)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        mode = self._mode_of(body)
        if mode == "hang":
            await asyncio.sleep(3_600)
        if mode == "die":
            await self._cut()
            return web.Response()
        if mode == "core_dies":  # as vLLM does it: an error, then the server says so, then it ends
            self.mode, self.health = "error", 503
            mode = "error"
        if mode == "error":
            return web.json_response({"error": {"message": "/secret/path 10.0.0.7"}}, status=500)
        if mode == "busy":
            return web.json_response({"error": {"message": "busy"}}, status=503)
        if mode == "refuse":
            return _refusal("The prompt is too long.", "messages")
        if mode == "echo_url":
            return _refusal(f"cannot read {_urls(body)[0]}", "messages")
        if mode == "die_before":
            return _die(request)
        if self.fetch_media:
            await self._fetch(body)
        if body.get("stream"):
            return await self._stream(request, body)
        await asyncio.sleep(self.tokens * self.interval_s)
        text = "".join(f"t{number} " for number in range(self.tokens))
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        return web.json_response(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": MODEL,
                "choices": [{**choice, "finish_reason": "stop"}],
                "usage": self._usage(body),
            }
        )

    def _mode_of(self, body: dict[str, Any]) -> Mode:
        poisoned = self.poison != "ok" and POISON in json.dumps(body)
        return self.poison if poisoned else self.mode

    async def _stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if self._mode_of(body) == "die_after_header":
            return _die(request)
        asked = (body.get("stream_options") or {}).get("include_usage")
        for number in range(self.tokens):
            if number == self.tokens // 2:
                if self.gate is not None:
                    await self.gate.wait()
                mode = self._mode_of(body)
                if mode == "die_mid":
                    return _die(request)
                if mode == "half_event":
                    await response.write(b'data: {"id": "chatcm')
                    return _die(request)
                if mode == "error_event":
                    await response.write(b'data: {"error": {"message": "/secret/path"}}\n\n')
                    return response
                if mode == "stall":
                    await asyncio.sleep(3_600)
            await response.write(_event({"content": f"t{number} "}, self._end(number, asked)))
            if self.interval_s:
                await asyncio.sleep(self.interval_s)
        if asked:
            last = {"choices": [], "usage": self._usage(body), "system_fingerprint": FINGERPRINT}
            await response.write(_chunk(last))
        await response.write(b"data: [DONE]\n\n")
        return response

    def _end(self, number: int, asked: bool | None) -> dict[str, Any]:
        """What vLLM says in the last event before the usage, or without one."""
        if number < self.tokens - 1:
            return {}
        return {"finish_reason": "stop", **({} if asked else {"system_fingerprint": FINGERPRINT})}

    def _usage(self, body: dict[str, Any]) -> dict[str, Any]:
        usage = {"prompt_tokens": 3, "total_tokens": 8, **self.usage}
        if body.get("return_selection"):
            usage["reduction"] = made_up(body)
        return usage

    async def _fetch(self, body: dict[str, Any]) -> None:
        async with aiohttp.ClientSession() as session:
            for url in _urls(body):
                async with session.get(url) as answer:
                    self.media.append(await answer.read())


def _urls(body: dict[str, Any]) -> list[str]:
    return [
        part[part["type"]]["url"]
        for message in body["messages"]
        if isinstance(message["content"], list)
        for part in message["content"]
        if part["type"].endswith("_url")
    ]


def _refusal(message: str, param: str) -> web.Response:
    error = {"message": message, "type": "BadRequestError", "param": param, "code": 400}
    return web.json_response({"error": error}, status=400)


def _die(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _event(delta: dict[str, Any], end: dict[str, Any]) -> bytes:
    reason = end.pop("finish_reason", None)
    return _chunk({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **end})


def _chunk(more: dict[str, Any]) -> bytes:
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    return b"data: " + json.dumps({**head, **more}, separators=(",", ":")).encode() + b"\n\n"


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--interval", type=float, default=0.05)
    given = parser.parse_args()
    async with MockUpstream(
        tokens=given.tokens, interval_s=given.interval, port=given.port
    ) as upstream:
        del upstream
        await asyncio.Event().wait()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        import uvloop

        uvloop.run(_main())
