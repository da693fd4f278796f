"""A chat server without a model, whose every delay is known: also `python -m ... PORT`."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from aiohttp import web

Mode = Literal["ok", "busy", "short", "cut", "error event", "hang"]

BLOCKS = 101
BLOCK_SIZE = 32
BLOCKS_EACH = 10
FULL = 1000


@dataclass
class MockServer:
    """Streams `tokens` tokens: an empty chunk, the first after `first_s`, one each `gap_s`.

    Each request holds `BLOCKS_EACH` KV blocks. With `serial`, requests wait for each other.
    """

    first_s: float = 0.05
    gap_s: float = 0.02
    tokens: int = 5
    mode: Mode = "ok"
    serial: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    preemptions: int = 0
    port: int = 0
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> web.AppRunner:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        assert site._server is not None
        self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        return runner

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "mock"}]})

    async def _metrics(self, request: web.Request) -> web.Response:
        use = self.running * BLOCKS_EACH / (BLOCKS - 1)
        done = len(self.bodies)
        return web.Response(
            text=(
                "# HELP vllm:kv_cache_usage_perc use\n"
                f'vllm:cache_config_info{{block_size="{BLOCK_SIZE}",num_gpu_blocks="{BLOCKS}"}} 1\n'
                f'vllm:kv_cache_usage_perc{{engine="0",model_name="m"}} {use}\n'
                f'vllm:num_requests_running{{engine="0",model_name="m"}} {self.running}\n'
                'vllm:num_requests_waiting{engine="0",model_name="m"} 0\n'
                f"vllm:num_preemptions_total {self.preemptions}\n"
                f"vllm:request_queue_time_seconds_sum {0.01 * done}\n"
                f"vllm:request_prefill_time_seconds_sum {0.03 * done}\n"
                f'ep_serve_stage_seconds_total{{stage="towers"}} {0.01 * done}\n'
            )
        )

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.mode == "busy":
            return web.json_response({"error": "busy"}, status=503)
        if self.mode == "hang":
            await asyncio.sleep(3600)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            with suppress(ConnectionError):
                if self.serial:
                    async with self._turn:
                        await self._answer(response, body)
                else:
                    await self._answer(response, body)
        finally:
            self.running -= 1
        return response

    async def _answer(self, response: web.StreamResponse, body: dict[str, Any]) -> None:
        ratio = body.get("keep_ratio", 1.0)
        first = self.first_s * ratio
        tokens = min(self.tokens, body.get("max_tokens", self.tokens))
        await self._send(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for number in range(tokens):
            await asyncio.sleep(self.gap_s if number else first)
            if self.mode == "cut" and number == 2:
                return
            if self.mode == "error event":
                await self._send(response, {"error": {"message": "no"}})
                return
            last = number == tokens - 1
            choice = {"delta": {"content": "a"}, "finish_reason": "length" if last else None}
            await self._send(response, {"choices": [choice]})
        usage: dict[str, Any] = {
            "prompt_tokens": 100 + int((FULL - 100) * ratio),
            "completion_tokens": tokens - (self.mode == "short"),
        }
        if "mm_processor_kwargs" not in body:
            full = FULL - 100
            usage["reduction"] = {
                "prompt_tokens_full": FULL,
                "av_tokens_full": full,
                "video": {"full": full - 200, "kept": 1},
                "audio": {"full": 200, "kept": 1},
                "image": {"full": 0, "kept": 0},
            }
        await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")

    @staticmethod
    async def _send(response: web.StreamResponse, chunk: dict[str, Any]) -> None:
        frame = {"id": "chat", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        await response.write(f"data: {json.dumps({**frame, **chunk})}\n\n".encode())


@contextmanager
def serving(server: MockServer) -> Iterator[MockServer]:
    """The server in a thread of its own, so that tests may block."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    runners: list[web.AppRunner] = []

    def serve() -> None:
        asyncio.set_event_loop(loop)
        runners.append(loop.run_until_complete(server.start()))
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runners[0].cleanup())
        loop.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
