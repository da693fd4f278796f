"""Media whose senders, servers or readers hang up or are slow, and a store that is full."""

from __future__ import annotations

import asyncio
import base64
import random
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
from aiohttp import web

from ep_serve.gateway.media.fetch import fetcher
from tests.clips import make_image, make_wav
from tests.gateway.abuse_scene import settled
from tests.gateway.conftest import MakeWorld, World, bearer
from tests.gateway.mock_upstream import MockUpstream
from tests.gateway.test_api import check_error
from tests.gateway.test_media import PICTURE, data_url, fetching, origin, part

pytestmark = pytest.mark.anyio

KEYS = [{"name": "a"}, {"name": "b"}]


@asynccontextmanager
async def tarpit() -> AsyncIterator[tuple[str, int, asyncio.Event]]:
    """A web server that answers nothing until the event is set, except for `/good`."""
    open_gate = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        if request.path != "/good":
            await open_gate.wait()
        return web.Response(body=PICTURE)

    async with origin(answer) as (url, port, _):
        try:
            yield url, port, open_gate
        finally:
            open_gate.set()


@pytest.mark.parametrize("keys", [None, KEYS])
async def test_inlined_media_do_not_wait_for_downloads(world: MakeWorld, keys: Any) -> None:
    async with (
        tarpit() as (url, port, open_gate),
        world(keys=keys, media={"concurrency": 3, **fetching(port, timeout_s=60)}) as w,
    ):
        who = [{"headers": bearer(key["name"])} for key in keys or []] or [{}, {}]
        stuck = [
            asyncio.create_task(w.ask(part("image_url", f"{url}/{number}"), **who[0]))
            for number in range(8)
        ]
        while w.gateway.media._fetching._free > 1:
            await asyncio.sleep(0.01)
        assert (await w.ask(part("image_url", data_url(PICTURE)), **who[1])).status_code == 200
        if keys:  # another tenant still fetches
            answer = await w.ask(part("image_url", f"{url}/good"), **who[1])
            assert answer.status_code == 200
        assert not any(task.done() for task in stuck)
        open_gate.set()
        assert {task.status_code for task in await asyncio.gather(*stuck)} == {200}
        await settled(w)


async def test_a_server_that_sends_too_slowly_is_given_up(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetcher, "IDLE_TIMEOUT_S", 0.3)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with suppress(ConnectionError):
            for byte in make_image():
                await response.write(bytes([byte]))
                await asyncio.sleep(0.05)
        return response

    async with (
        origin(answer) as (url, port, _),
        world(media=fetching(port, timeout_s=60)) as w,
    ):
        error = check_error(await w.ask(part("image_url", url)), 422, "media_not_fetched")
        assert "too slowly" in error["message"]
        await settled(w)


async def test_media_requests_that_disconnect_leave_nothing_behind(world: MakeWorld) -> None:
    moments = random.Random(0)
    async with tarpit() as (url, port, _), world(media=fetching(port)) as w:

        async def one(number: int) -> None:
            sound = make_wav(5 + number / 100)
            if number % 3 == 0:
                asked: Any = w.upload(sound)
            elif number % 3 == 1:
                asked = w.ask(part("audio_url", data_url(sound)))
            else:
                asked = w.ask(part("audio_url", f"{url}/{'good' if number % 2 else number}"))
            task = asyncio.create_task(asked)
            await asyncio.sleep(moments.random() * 0.15)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        for start in range(0, 120, 12):
            await asyncio.gather(*(one(number) for number in range(start, start + 12)))
        await settled(w)
        assert (await w.ask(part("image_url", data_url(PICTURE)))).status_code == 200


async def test_slow_uploads_of_one_tenant_leave_memory_for_others(world: MakeWorld) -> None:
    """Each takes a little memory, so that many would take it all."""
    limits = {"max_body_bytes": 1 << 19, "max_text_bytes": 1 << 19, "max_buffered_bytes": 1 << 21}
    end = asyncio.Event()

    async def slowly() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        await end.wait()
        yield b"no medium\r\n--x--\r\n"

    async with world(keys=KEYS, request=limits) as w:
        kind = {"content-type": "multipart/form-data; boundary=x", **bearer("a")}
        uploads = [
            asyncio.create_task(w.client.post("/v1/files", content=slowly(), headers=kind))
            for _ in range(8)
        ]
        async with asyncio.timeout(20):
            while w.gateway.limits._running["a"] < 4:
                await asyncio.sleep(0.01)
        check_error(await w.upload(PICTURE, headers=bearer("a")), 429, "overloaded")
        assert (await w.upload(PICTURE, headers=bearer("b"))).status_code == 200
        end.set()
        await asyncio.gather(*uploads, return_exceptions=True)
        await settled(w)


# -- reading ------------------------------------------------------------------------------------

LARGE = make_wav(300)
"""More than the buffers between two sockets hold."""


@asynccontextmanager
async def silent_reader(port: int, path: str, headers: dict[str, str]) -> AsyncIterator[Any]:
    """A connection that asks for something and does not read the answer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8_192)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=1_024)
    lines = [f"GET {path} HTTP/1.1", "host: x", *(f"{k}: {v}" for k, v in headers.items())]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
    try:
        yield reader
    finally:
        writer.transport.abort()


async def uploaded(w: World, **options: Any) -> str:
    made = await w.upload(LARGE, "a.wav", **options)
    assert made.status_code == 200, made.text
    return f"/v1/files/{made.json()['id']}/content"


async def test_a_download_that_nobody_reads_ends(world: MakeWorld) -> None:
    keys = [{"name": "a", "concurrent_requests": 1}]
    async with world(keys=keys, request={"body_timeout_s": 0.5}) as w:
        path = await uploaded(w, headers=bearer("a"))
        async with silent_reader(w.now.port, path, bearer("a")):
            while not w.gateway.limits._running["a"]:
                await asyncio.sleep(0.01)
            refused = await w.client.get(path, headers=bearer("a"))
            check_error(refused, 429, "concurrency_limit_exceeded")
            await settled(w)
        assert (await w.client.get(path, headers=bearer("a"))).content == LARGE


async def test_a_gateway_that_stops_finishes_downloads(world: MakeWorld) -> None:
    async with world() as w:
        path = await uploaded(w)
        async with silent_reader(w.now.port, path, {"connection": "close"}) as reader:
            await asyncio.sleep(0.2)
            draining = asyncio.create_task(w.now.drain())
            await asyncio.sleep(0.5)
            assert not draining.done()
            content = await reader.read()
            assert content.endswith(LARGE[-100:])
            assert len(content) > len(LARGE)
            await draining


async def test_an_engine_that_does_not_read_media_is_disconnected(world: MakeWorld) -> None:
    async with world(request={"body_timeout_s": 0.5}) as w:
        path = await uploaded(w)
        file = w.gateway.media.store.file("anonymous", path.split("/")[3])
        base = w.gateway.media.server.base_url
        async with w.gateway.media.store.pinned((await file).digest) as medium:
            with w.gateway.media.server.publish(medium) as url:
                port = int(base.rpartition(":")[2])
                async with silent_reader(port, url.removeprefix(base), {}) as reader:
                    await asyncio.sleep(3)
                    content = b""
                    with suppress(ConnectionError):
                        content = await reader.read()
                    assert len(content) < len(LARGE)


# -- files --------------------------------------------------------------------------------------


async def test_a_file_that_has_expired_is_served_nowhere(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world() as w:
        made = (await w.upload(PICTURE)).json()
        content = [{"type": "file", "file": {"file_id": made["id"]}}]
        assert (await w.ask(content)).status_code == 200
        monkeypatch.setattr("time.time", lambda: float(made["expires_at"]))
        url = f"/v1/files/{made['id']}"
        for answer in (
            await w.ask(content),
            await w.client.get(url),
            await w.client.get(f"{url}/content"),
            await w.client.delete(url),
        ):
            check_error(answer, 404, "file_not_found")
        assert (await w.client.get("/v1/files")).json()["data"] == []
        assert len(w.engine.requests) == 1


async def test_a_full_disk_is_reported_and_stored_media_are_served(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world([MockUpstream(fetch_media=True)]) as w:
        made = (await w.upload(PICTURE)).json()

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("ep_serve.gateway.media.store.upload.Upload._write", full)
            for answer in (
                await w.upload(make_image(number=1)),
                await w.ask(part("image_url", data_url(make_image(number=2)))),
            ):
                check_error(answer, 507, "disk_full")
            url = f"/v1/files/{made['id']}"
            assert (await w.client.get(f"{url}/content")).content == PICTURE
            assert (await w.client.get("/v1/files")).json()["data"] == [made]
            content = [{"type": "file", "file": {"file_id": made["id"]}}]
            assert (await w.ask(content)).status_code == 200
            assert w.engine.media == [PICTURE]
            assert (await w.ask("text")).status_code == 200
            await settled(w)
        assert (await w.upload(make_image(number=1))).status_code == 200


async def test_junk_of_one_tenant_leaves_the_files_of_another(world: MakeWorld) -> None:
    quota = 3 * len(LARGE)
    async with world(keys=KEYS, store={"quota_bytes": quota}) as w:
        sounds = [make_wav(300 + number) for number in range(2)]
        for sound in sounds:
            assert (await w.upload(sound, headers=bearer("b"))).status_code == 200
        junk = bytes(len(LARGE))
        for _ in range(4):
            check_error(await w.upload(junk, headers=bearer("a")), 415)
            refused = await w.ask(part("audio_url", data_url(junk)), headers=bearer("a"))
            check_error(refused, 415)
        assert len((await w.client.get("/v1/files", headers=bearer("b"))).json()["data"]) == 2
        await settled(w)


async def test_media_that_running_requests_use_leave_room_for_other_tenants(
    world: MakeWorld,
) -> None:
    gate = asyncio.Event()
    async with AsyncExitStack() as stack:
        w = await stack.enter_async_context(
            world([MockUpstream(gate=gate)], keys=KEYS, store={"quota_bytes": 10 * 400_000})
        )

        async def ask(name: str, number: int) -> int:
            sound = make_wav(12 + number / 100)  # some 390 kB
            async with w.stream(part("audio_url", data_url(sound)), headers=bearer(name)) as answer:
                await answer.aread()
                return answer.status_code

        tasks = [asyncio.create_task(ask("a", number)) for number in range(9)]
        while sum(task.done() for task in tasks) + len(w.engine.requests) < len(tasks):
            await asyncio.sleep(0.01)
        other = asyncio.create_task(ask("b", 20))
        while len(w.engine.requests) + sum(task.done() for task in tasks) == len(tasks):
            await asyncio.sleep(0.01)
            assert not other.done()
        gate.set()
        codes = await asyncio.gather(*tasks)
        assert set(codes) == {200, 429}
        assert await other == 200
        await settled(w)


def test_the_large_sound_is_larger_than_it_is_as_text() -> None:
    assert len(base64.b64encode(LARGE)) > len(LARGE) > 8 << 20
