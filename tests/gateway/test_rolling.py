"""Gateways that are replaced one after the other while 64 streams run."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.balancer import Balancer
from tests.gateway.conftest import gateway_process
from tests.gateway.mock_upstream import MODEL, MockUpstream

pytestmark = [pytest.mark.anyio, pytest.mark.slow]

STREAMS = 64
TOKENS = 12
PATIENT: dict[str, Any] = {
    # Nothing here ends because a machine is busy.
    "routing": {
        "health_timeout_s": 30,
        "connect_timeout_s": 60,
        "first_byte_timeout_s": 120,
        "idle_timeout_s": 120,
    },
    "queue": {"timeout_s": 120},
    "drain": {"delay_s": 2, "timeout_s": 120},
}
WHOLE = "whole"


async def stream(client: httpx.AsyncClient) -> str:
    """How one streamed request ended."""
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "x"}]}
    try:
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            text = (await response.aread()).decode()
    except httpx.HTTPError as error:
        return repr(error)
    if response.status_code != 200:
        return f"{response.status_code} {text}"
    complete = text.endswith("data: [DONE]\n\n") and text.count("data: ") == TOKENS + 1
    return WHOLE if complete and '"error"' not in text else text[-300:]


async def test_replacing_two_gateways_under_64_streams_loses_nothing(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(MockUpstream(tokens=TOKENS, interval_s=0.1))
        balancer = await stack.enter_async_context(Balancer())
        # Each request has a connection of its own: one that is idle may end as it is used again.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        client = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{balancer.port}", timeout=120, limits=limits
            )
        )

        async def start(name: str) -> tuple[asyncio.subprocess.Process, int]:
            folder = tmp_path / name
            folder.mkdir()
            process, port = await stack.enter_async_context(
                gateway_process(folder, engine, **PATIENT)
            )
            await balancer.add(port)
            return process, port

        ends: Counter[str] = Counter()
        over = asyncio.Event()

        async def worker() -> None:
            while not over.is_set():
                ends[await stream(client)] += 1

        async def finished(count: int) -> None:
            """Wait until as many more requests have ended."""
            goal = ends.total() + count
            while ends.total() < goal:
                await asyncio.sleep(0.05)

        old = [await start("a"), await start("b")]
        workers = [asyncio.create_task(worker()) for _ in range(STREAMS)]
        await finished(1)
        for number, (process, port) in enumerate(old):
            while engine.running < STREAMS // 2:
                await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
            balancer.remove(port)
            await start(f"new-{number}")
            await finished(STREAMS)
        over.set()
        await asyncio.gather(*workers)
    print(f"{ends.total()} streams")
    assert set(ends) == {WHOLE}, ends
    assert engine.cancelled == 0
    assert len(engine.requests) == ends.total()
