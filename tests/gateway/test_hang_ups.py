"""Clients that go away at any moment leave nothing behind, in the gateway or in an engine."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from ep_serve.gateway.settings import QueueSettings, RoutingSettings
from ep_serve.gateway.upstream.circuit import Outcome
from ep_serve.gateway.upstream.pool import Upstream
from ep_serve.gateway.upstream.router import Demand
from tests.gateway.conftest import MakeWorld, World
from tests.gateway.mock_upstream import MODEL, MockUpstream
from tests.gateway.test_routing import make_router

pytestmark = pytest.mark.anyio

ROUTING = {"concurrency": 4, "connect_timeout_s": 10, "health_timeout_s": 10}
"""So few that most requests wait for an engine."""


async def hang_up(port: int, body: dict[str, Any], after_s: float, at_start: bool) -> None:
    """Send a request and close the connection, some time after sending or after the first byte."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps({"model": MODEL, **body}).encode()
    head = f"host: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\n" + head.encode() + data)
    if at_start:
        await reader.read(1)
    await asyncio.sleep(after_s)
    writer.transport.abort()


async def left_over(w: World) -> dict[str, float]:
    """What still runs or waits, that of engines too."""
    upstreams = w.gateway.upstreams.all
    value = w.gateway.metrics.registry.get_sample_value
    return {
        "active": sum(one.active for one in upstreams),
        "work": sum(one.work for one in upstreams),
        "waiting": len(w.gateway.router._waiting),
        "in_flight": value("ep_serve_gateway_in_flight") or 0,
        "queued": value("ep_serve_gateway_queued") or 0,
        "running": sum(engine.running for engine in w.engines),
    }


@pytest.mark.parametrize("seed", range(3))
async def test_clients_that_disconnect_at_any_moment_leave_nothing_behind(
    world: MakeWorld, seed: int
) -> None:
    chance = random.Random(seed)
    engines = [
        MockUpstream(tokens=4, interval_s=0.02),
        MockUpstream(tokens=4, interval_s=0.02, poison="error"),
    ]
    async with world(engines, routing=ROUTING, queue={"timeout_s": 0.2}) as w:
        texts = ["x", "poison", "x" * 300_000]

        async def one() -> None:
            await asyncio.sleep(chance.uniform(0, 0.5))
            text = chance.choices(texts, (8, 2, 1))[0]
            body = {
                "messages": [{"role": "user", "content": text}],
                "stream": chance.random() < 0.5,
            }
            await hang_up(w.now.port, body, chance.uniform(0, 0.12), chance.random() < 0.3)

        await asyncio.gather(*(one() for _ in range(200)))
        async with asyncio.timeout(20):
            while any((await left_over(w)).values()):
                await asyncio.sleep(0.05)
        answers = await asyncio.gather(*(w.ask() for _ in range(8)))
        assert {answer.status_code for answer in answers} == {200}


async def test_a_disconnect_cancels_the_request_at_the_engine(world: MakeWorld) -> None:
    engine = MockUpstream(mode="hang")
    async with world([engine], routing={"first_byte_timeout_s": 600, "answer_timeout_s": 600}) as w:
        for stream in (True, False):
            body = {"messages": [{"role": "user", "content": "x"}], "stream": stream}
            asking = asyncio.create_task(hang_up(w.now.port, body, 0.3, at_start=False))
            async with asyncio.timeout(15):
                while not engine.running:
                    await asyncio.sleep(0.01)
                await asking
                while engine.running:
                    await asyncio.sleep(0.01)
        assert engine.cancelled == 2


@pytest.mark.parametrize("seed", range(20))
async def test_cancelled_requests_release_their_engines_and_leave_the_queue(seed: int) -> None:
    chance = random.Random(seed)
    router, engines = make_router(3, RoutingSettings(concurrency=2), QueueSettings(timeout_s=30))
    for engine, models in zip(engines, ("a", "ab", "b"), strict=True):
        engine.models = {model: {} for model in models}
    demands: dict[asyncio.Task[Upstream], tuple[Demand, frozenset[str]]] = {}

    async def settle() -> None:
        for _ in range(5):
            await asyncio.sleep(0)

    def release(task: asyncio.Task[Upstream]) -> None:
        demand, _ = demands.pop(task)
        if not task.cancelled() and task.exception() is None:
            router.release(task.result(), demand, chance.choice((Outcome.SUCCEEDED, None)))

    for _ in range(300):
        tasks = list(demands)
        step = chance.random()
        if step < 0.5 or not tasks:
            avoid = frozenset(one.name for one in engines if chance.random() < 0.1)
            demand = Demand(chance.choice("ab"), chance.choice(("", "clip")))
            demands[asyncio.create_task(router.acquire(demand, avoid))] = demand, avoid
        elif step < 0.6:
            engine = chance.choice(engines)
            engine.record_health_check(True) if not engine.is_healthy else engine.mark_unhealthy()
            router.dispatch()
        else:
            task = chance.choice(tasks)
            if chance.random() < 0.4:
                task.cancel()
            elif task.done():
                release(task)
            if chance.random() < 0.3:  # or another step comes before its task runs
                continue
        await settle()
        for task in [one for one in demands if one.cancelled()]:
            del demands[task]
        held = [task for task in demands if task.done() and task.exception() is None]
        assert sum(one.active for one in engines) == len(held)
        for task, (demand, avoid) in demands.items():
            free = [one for one in router._candidates(demand, avoid) if not one.is_full]
            assert task.done() or not free
    for task in demands:
        task.cancel()
    await asyncio.gather(*demands, return_exceptions=True)
    for task in list(demands):
        release(task)
    assert not any(one.active for one in engines)
    assert not router._waiting
