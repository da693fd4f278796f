"""Memory and time that request bodies take, and whose they are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import httpx
import pytest

from ep_serve.gateway.settings import SettingsError, load
from tests.clips import make_wav
from tests.gateway.conftest import MakeWorld, World, bearer
from tests.gateway.mock_upstream import MODEL, MockUpstream
from tests.gateway.test_api import check_error
from tests.gateway.test_media import data_url, part

pytestmark = pytest.mark.anyio

MIB = 1 << 20
SETTINGS: dict[str, Any] = {
    "max_body_bytes": 2 * MIB,
    "max_buffered_bytes": 4 * MIB,
    "body_timeout_s": 20,
}
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


def body_of(nbytes: int) -> bytes:
    message = {"role": "user", "content": "x" * nbytes}
    return json.dumps({"model": MODEL, "messages": [message]}).encode()


@asynccontextmanager
async def sending(
    world: World, body: bytes, sent: int, headers: dict[str, str]
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection on which part of a body has been sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.now.port)
    try:
        lines = {**headers, "content-length": str(len(body))}.items()
        head = HEAD + "".join(f"{name}: {value}\r\n" for name, value in lines).encode()
        writer.write(head + b"\r\n" + body[:sent])
        await writer.drain()
        yield reader, writer
    finally:
        writer.close()


async def until(true: Any) -> None:
    async with asyncio.timeout(60):
        while not true():
            await asyncio.sleep(0.01)


async def test_slow_bodies_of_one_tenant_leave_room_for_others(world: MakeWorld) -> None:
    keys = [{"name": "a"}, {"name": "a2", "tenant": "a"}, {"name": "b"}]
    body = body_of(MIB)
    async with world(keys=keys, request=SETTINGS) as w, AsyncExitStack() as stack:
        for number in range(8):
            slow = sending(w, body, MIB * 7 // 8, bearer("a" if number % 2 else "a2"))
            await stack.enter_async_context(slow)
        await until(lambda: w.gateway.bodies.quota.used_bytes > MIB)
        answer = await w.ask("x" * MIB, headers=bearer("b"))
        assert answer.status_code == 200, answer.text
        refused = await w.ask("x" * MIB, headers=bearer("a"))
        check_error(refused, 429, "overloaded")


async def test_without_keys_each_address_has_its_share(world: MakeWorld) -> None:
    async with world(request=SETTINGS) as w, AsyncExitStack() as stack:
        for _ in range(4):
            await stack.enter_async_context(sending(w, body_of(MIB), MIB * 7 // 8, {}))
        await until(lambda: w.gateway.bodies.quota.used_bytes > MIB)
        check_error(await w.ask("x" * MIB), 429, "overloaded")
        transport = httpx.AsyncHTTPTransport(local_address="127.0.0.2")
        base = f"http://127.0.0.1:{w.now.port}"
        async with httpx.AsyncClient(base_url=base, transport=transport, timeout=20) as other:
            headers = {"content-type": "application/json"}
            answer = await other.post("/v1/chat/completions", content=body_of(MIB), headers=headers)
            assert answer.status_code == 200, answer.text


async def test_memory_is_given_back_however_a_request_ends(world: MakeWorld) -> None:
    body = body_of(MIB // 4)
    async with world(request=SETTINGS) as w:

        async def hang_up(number: int) -> None:
            sent = len(body) * min(number, 16) // 16
            async with sending(w, body, sent, {}):
                await asyncio.sleep(number * 0.003)

        for _ in range(5):
            await asyncio.gather(*(hang_up(number) for number in range(40)))
        await w.client.post("/v1/chat/completions", content=b"[" * 1_000, headers={})
        w.engine.mode = "error"
        await w.ask()
        await until(lambda: not w.gateway.bodies.quota.used_bytes)


async def test_media_go_to_the_disk_while_they_arrive(world: MakeWorld) -> None:
    request = {**SETTINGS, "max_buffered_bytes": 16 * MIB, "max_buffered_share": 1}
    async with world(request=request, routing={"idle_timeout_s": 60}) as w:
        w.engine.gate = asyncio.Event()
        media = [data_url(make_wav(30, 16_000 + number)) for number in range(24)]
        assert sum(map(len, media)) > 16 * MIB

        async def ask(medium: str) -> None:
            async with w.stream(part("audio_url", medium)) as response:
                assert response.status_code == 200, await response.aread()
                await response.aread()

        async with asyncio.TaskGroup() as tasks:
            for medium in media:
                tasks.create_task(ask(medium))
            await until(lambda: w.engine.running == len(media))
            assert w.gateway.bodies.quota.used_bytes < MIB // 4
            w.engine.gate.set()


async def test_slow_media_hold_little_memory(world: MakeWorld) -> None:
    message = {"role": "user", "content": part("audio_url", data_url(bytes(MIB)))}
    body = json.dumps({"model": MODEL, "messages": [message]}).encode()
    async with world(request=SETTINGS) as w, AsyncExitStack() as stack:
        for _ in range(8):
            await stack.enter_async_context(sending(w, body, MIB, {}))
        incoming = w.gateway.settings.store.path / "incoming"
        await until(lambda: sum(file.stat().st_size for file in incoming.iterdir()) > 4 * MIB)
        assert w.gateway.bodies.quota.used_bytes < 2 * MIB
        await stack.aclose()
        await until(lambda: not list(incoming.iterdir()))


async def test_text_takes_no_memory_once_its_answer_has_begun(world: MakeWorld) -> None:
    gate = asyncio.Event()
    mocks = [MockUpstream(mode="die_before"), MockUpstream(gate=gate)]
    async with world(mocks, request=SETTINGS) as w, w.stream("x" * (MIB // 2)) as response:
        pieces = response.aiter_bytes()
        assert await anext(pieces)
        assert w.gateway.bodies.quota.used_bytes == 0
        gate.set()
        assert b"[DONE]" in b"".join([piece async for piece in pieces])


async def test_a_body_may_take_its_time_but_not_stop(world: MakeWorld) -> None:
    request = {**SETTINGS, "body_timeout_s": 2, "min_body_rate": 10_000}
    body = body_of(120_000)
    async with world(request=request) as w:

        async def send(first: int, pause_s: float, step: int) -> bytes:
            headers = {"connection": "close"}
            async with sending(w, body, first, headers) as (reader, writer):
                for start in range(first, len(body), step):
                    await asyncio.sleep(pause_s)
                    with suppress(ConnectionError):
                        writer.write(body[start : start + step])
                    if not reader.at_eof() and reader._buffer:  # type: ignore[attr-defined]
                        break
                return await reader.readline()

        steady, dripping, stopping = await asyncio.gather(
            send(0, 0.1, 4_000), send(0, 0.1, 10), send(100_000, 3, 100_000)
        )
        assert b" 200 " in steady  # it took three seconds
        assert b" 408 " in dripping
        assert b" 408 " in stopping


async def test_settings_that_let_no_large_body_in_are_refused() -> None:
    options = {"upstreams": ["http://a"], "request": {"max_buffered_bytes": 50 * MIB}}
    with pytest.raises(SettingsError, match=r"max_body_bytes .* max_buffered_share"):
        load(None, options)
