"""Hostile requests: each refused with the right status, nothing fetched, nothing told.

The table is in the `abuse_*` modules. Every case runs against one gateway whose `trap` must never
be reached; the raw ones speak HTTP by hand.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from aiohttp import web

from tests.clips import make_image
from tests.gateway import abuse_chat, abuse_http
from tests.gateway.abuse_fetching import REBINDING, TRAP, misbehave
from tests.gateway.abuse_scene import CASES, CLOSED, Scene, inline, settled
from tests.gateway.conftest import MakeWorld, bearer
from tests.gateway.mock_upstream import MODEL

pytestmark = pytest.mark.anyio

KEYS: list[dict[str, Any]] = [{"name": "a"}, {"name": "b"}]
SETTINGS: dict[str, Any] = {
    "request": {
        "max_body_bytes": 3 << 20,
        "max_messages": 50,
        "max_parts": 60,
        "body_timeout_s": 0.5,
        "header_timeout_s": 0.5,
        "max_header_bytes": 16_384,
    },
    "media": {
        "max_bytes": 1 << 20,
        "max_per_request": 4,
        "probe": {"max_duration_s": 60, "max_pixels": 4_000_000},
    },
}


@asynccontextmanager
async def staged(world: MakeWorld) -> AsyncIterator[Scene]:
    hits: list[str] = []

    async def trapped(request: web.Request) -> web.Response:
        hits.append(str(request.url))
        return web.Response(body=make_image())

    trap = await _serve("127.0.0.1", trapped)
    trap_port: int = trap.addresses[0][1]
    evil = await _serve("127.0.0.2", misbehave, trap_port)
    evil_port: int = evil.addresses[0][1]
    fetch = {
        "ports": [80, trap_port, evil_port],
        "allow_networks": ["127.0.0.2/32"],
        "timeout_s": 0.6,
    }
    settings = {**SETTINGS, "media": {**SETTINGS["media"], "fetch": fetch}}
    try:
        async with world(keys=KEYS, **settings) as w:
            yield Scene(w, f"http://127.0.0.2:{evil_port}", trap_port, hits)
    finally:
        await trap.cleanup()
        await evil.cleanup()


async def _serve(host: str, handler: Any, trap_port: int = 0) -> web.AppRunner:
    app = web.Application()
    app[TRAP] = trap_port
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, host, 0).start()
    return runner


def check(name: str, answer: httpx.Response, scene: Scene) -> list[str]:
    """What is wrong with the answer to a case."""
    _, statuses = CASES[name]
    wrong = []
    if answer.status_code not in statuses:
        wrong.append(f"{name}: {answer.status_code} {answer.text[:200]}, not {statuses}")
    if answer.status_code != CLOSED:
        try:
            error = json.loads(answer.text)["error"]
            if set(error) != {"message", "type", "param", "code"}:
                wrong.append(f"{name}: {error}")
        except (ValueError, KeyError, TypeError):
            wrong.append(f"{name}: not an error object: {answer.text[:200]}")
    internal = (
        str(scene.world.gateway.settings.store.path),
        str(scene.world.engine.port),
        scene.world.gateway.media.server.base_url,
        bearer("a")["authorization"].removeprefix("Bearer "),
        "Traceback",
    )
    wrong += [f"{name}: tells {secret}" for secret in internal if secret in answer.text]
    if scene.hits:
        wrong.append(f"{name}: the trap was reached")
    if scene.world.engine.requests:
        wrong.append(f"{name}: the engine was reached")
    return wrong


async def test_hostile_requests_are_refused(world: MakeWorld) -> None:
    assert abuse_chat.MEDIA
    assert abuse_http.RAW
    assert len(CASES) >= 60
    wrong: list[str] = []
    async with staged(world) as scene:
        gate = asyncio.Semaphore(8)

        async def play(name: str) -> None:
            async with gate:
                wrong.extend(check(name, await CASES[name][0](scene), scene))

        await asyncio.gather(*(play(name) for name in CASES if name != REBINDING))
        await play(REBINDING)  # it changes how the gateway finds addresses
        assert not wrong, "\n".join(wrong)
        await settled(scene.world)
        good = await scene.ask("still there?")
        assert good.status_code == 200
        assert good.json()["model"] == MODEL


async def test_a_number_or_text_that_engines_cannot_represent_is_named(world: MakeWorld) -> None:
    async with world() as w:
        for place, body in abuse_chat.places().items():
            if "." in place or "[" in place:
                continue
            for leaf in ("1e999", "-Infinity", "NaN", str(2**64), '["a\\udc00"]'):
                text = body.replace(f'"{abuse_chat.HERE}"', leaf)
                answer = await w.client.post(
                    "/v1/chat/completions",
                    content=text,
                    headers={"content-type": "application/json"},
                )
                error = answer.json()["error"]
                assert answer.status_code == 400, (place, leaf)
                assert error["param"].partition("[")[0] == place, (leaf, error)
        assert not w.engine.requests


async def test_hostile_requests_that_disconnect_leave_nothing_behind(world: MakeWorld) -> None:
    moments = random.Random(0)
    async with staged(world) as scene:

        async def play(name: str) -> None:
            task = asyncio.create_task(CASES[name][0](scene))
            await asyncio.wait([task], timeout=moments.random() * 0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        names = [name for name in CASES if name != REBINDING]
        moments.shuffle(names)
        for start in range(0, len(names), 8):
            await asyncio.gather(*(play(name) for name in names[start : start + 8]))
        await settled(scene.world)
        assert (await scene.ask("still there?")).status_code == 200


async def test_hostile_requests_of_one_tenant_take_nothing_from_another(world: MakeWorld) -> None:
    picture = [{"type": "image_url", "image_url": {"url": inline(make_image())}}]
    async with staged(world) as scene:
        kept = await scene.world.upload(make_image(number=2), headers=bearer("b"))
        assert kept.status_code == 200
        named = [{"type": "file", "file": {"file_id": kept.json()["id"]}}]
        names = [name for name in CASES if name != REBINDING]
        hostile = [asyncio.create_task(CASES[name][0](scene)) for name in names]
        wrong = []
        while not all(task.done() for task in hostile):
            for content in ("text", picture, named):
                answer = await scene.ask(content, headers=bearer("b"))
                if answer.status_code != 200:
                    wrong.append(f"{answer.status_code} {answer.text[:200]}")
            await asyncio.sleep(0.05)
        await asyncio.gather(*hostile, return_exceptions=True)
        assert not wrong, "\n".join(wrong)
        await settled(scene.world)
