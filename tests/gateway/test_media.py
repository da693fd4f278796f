"""Media on their way through the gateway."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from tests.clips import make_clip, make_image, make_wav
from tests.gateway.conftest import MakeWorld, World, bearer
from tests.gateway.mock_upstream import MockUpstream
from tests.gateway.test_api import check_error

pytestmark = pytest.mark.anyio

PICTURE = make_image()
SOUND = make_wav(0.5)
CLIP = make_clip(seconds=1)
KIND = {"image_url": PICTURE, "audio_url": SOUND, "video_url": CLIP}


def data_url(data: bytes, mime: str = "application/octet-stream") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def part(kind: str, url: str) -> list[dict[str, Any]]:
    return [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "What is this?"}]


@asynccontextmanager
async def origin(answer: Any) -> AsyncIterator[tuple[str, int, list[web.Request]]]:
    """A web server that answers everything with `answer(request)`; its URL, port, requests."""
    seen: list[web.Request] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append(request)
        response: web.StreamResponse = await answer(request)
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    try:
        yield f"http://127.0.0.1:{port}", port, seen
    finally:
        await runner.cleanup()


def fetching(port: int, **more: Any) -> dict[str, Any]:
    """Settings that let a test's web server be fetched from."""
    return {"fetch": {"ports": [port], "allow_networks": ["127.0.0.0/8"], **more}}


@pytest.mark.parametrize("kind", sorted(KIND))
async def test_inlined_media_reach_the_engine_by_reference(world: MakeWorld, kind: str) -> None:
    async with world([MockUpstream(fetch_media=True)]) as w:
        answer = await w.ask(part(kind, data_url(KIND[kind])))
        assert answer.status_code == 200, answer.text
        sent = w.engine.requests[-1]["messages"][0]["content"][0]
        assert sent["type"] == kind
        assert sent[kind]["url"].startswith("http://127.0.0.1:")
        assert len(sent["uuid"]) == 64
        assert w.engine.media == [KIND[kind]]


async def test_openais_input_audio_becomes_a_sound(world: MakeWorld) -> None:
    async with world([MockUpstream(fetch_media=True)]) as w:
        audio = {"data": base64.b64encode(SOUND).decode(), "format": "wav"}
        answer = await w.ask([{"type": "input_audio", "input_audio": audio}])
        assert answer.status_code == 200, answer.text
        assert w.engine.requests[-1]["messages"][0]["content"][0]["type"] == "audio_url"
        assert w.engine.media == [SOUND]


async def test_the_detail_of_a_picture_is_kept(world: MakeWorld) -> None:
    async with world() as w:
        content = part("image_url", data_url(PICTURE))
        content[0]["image_url"]["detail"] = "low"
        await w.ask(content)
        sent = w.engine.requests[-1]["messages"][0]["content"][0]
        assert sent["image_url"]["detail"] == "low"


async def test_media_are_fetched_from_urls(world: MakeWorld) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=CLIP)

    async with (
        origin(answer) as (url, port, seen),
        world([MockUpstream(fetch_media=True)], media=fetching(port)) as w,
    ):
        response = await w.ask(part("video_url", f"{url}/a.mp4"), headers={"cookie": "a=b"})
        assert response.status_code == 200, response.text
        assert w.engine.media == [CLIP]
        sent = {name.lower() for name in seen[0].headers}
        assert sent <= {"host", "accept", "accept-encoding", "user-agent", "connection"}


async def test_a_reference_ends_with_its_request(world: MakeWorld) -> None:
    async with world() as w:
        await w.ask(part("image_url", data_url(PICTURE)))
        url = w.engine.requests[-1]["messages"][0]["content"][0]["image_url"]["url"]
        assert (await w.client.get(url)).status_code == 404
        assert (await w.client.get(url.rpartition("/")[0] + "/x")).status_code == 404


async def test_the_cache_id_is_the_contents_and_the_tenants(world: MakeWorld) -> None:
    keys = [{"name": "a", "tenant": "t"}, {"name": "b", "tenant": "t"}, {"name": "c"}]
    async with world(keys=keys) as w:
        ids = []
        for name, data in (("a", PICTURE), ("b", PICTURE), ("c", PICTURE), ("a", PICTURE + b"x")):
            answer = await w.ask(part("image_url", data_url(data)), headers=bearer(name))
            assert answer.status_code == 200, answer.text
            ids.append(w.engine.requests[-1]["messages"][0]["content"][0]["uuid"])
        assert ids[0] == ids[1]
        assert len(set(ids)) == 3
        assert hashlib.sha256(PICTURE).hexdigest() not in ids


async def test_where_the_engine_finds_media_is_never_shown(world: MakeWorld) -> None:
    async with world() as w:
        w.engine.mode = "echo_url"
        answer = await w.ask(part("image_url", data_url(PICTURE)))
        error = check_error(answer, 400)
        assert "127.0.0.1" not in error["message"]


async def test_questions_about_one_clip_meet_one_engine(world: MakeWorld) -> None:
    async with world(3) as w:
        for _ in range(6):
            assert (await w.ask(part("video_url", data_url(CLIP)))).status_code == 200
        assert sorted(len(engine.requests) for engine in w.engines) == [0, 0, 6]


async def test_a_medium_sent_twice_is_stored_and_probed_once(world: MakeWorld) -> None:
    async with world() as w:
        for _ in range(3):
            await w.ask(part("image_url", data_url(PICTURE)))
        value = w.gateway.metrics.registry.get_sample_value
        assert value("ep_serve_gateway_probe_seconds_count") == 1
        assert value("ep_serve_gateway_store_hits_total") == 2
        async with asyncio.timeout(10):  # copies are discarded beside the answer
            while w.gateway.media.store.used_bytes != len(PICTURE):
                await asyncio.sleep(0.01)


# -- files ------------------------------------------------------------------------------------


async def test_a_file_is_sent_once_and_named_afterwards(world: MakeWorld) -> None:
    async with world([MockUpstream(fetch_media=True)]) as w:
        made = (await w.upload(CLIP, "a clip.mp4")).json()
        assert made["object"] == "file"
        assert made["bytes"] == len(CLIP)
        assert made["filename"] == "a clip.mp4"
        for content in (
            {"type": "file", "file": {"file_id": made["id"]}},
            {"type": "video_url", "video_url": {"file_id": made["id"]}},
        ):
            answer = await w.ask([content])
            assert answer.status_code == 200, answer.text
            assert w.engine.requests[-1]["messages"][0]["content"][0]["type"] == "video_url"
        assert w.engine.media == [CLIP, CLIP]


async def test_files_are_listed_shown_read_and_deleted(world: MakeWorld) -> None:
    async with world() as w:
        ids = [(await w.upload(make_image(number=n))).json()["id"] for n in range(3)]
        listed = (await w.client.get("/v1/files")).json()
        assert [entry["id"] for entry in listed["data"]] == ids[::-1]
        page = (await w.client.get("/v1/files", params={"limit": 2})).json()
        assert page["has_more"]
        rest = await w.client.get("/v1/files", params={"after": page["last_id"]})
        assert [entry["id"] for entry in rest.json()["data"]] == ids[:1]
        assert (await w.client.get(f"/v1/files/{ids[0]}")).json() == listed["data"][2]
        content = await w.client.get(f"/v1/files/{ids[0]}/content")
        assert content.content == make_image(number=0)
        assert content.headers["content-disposition"].startswith("attachment")
        deleted = await w.client.delete(f"/v1/files/{ids[0]}")
        assert deleted.json() == {"id": ids[0], "object": "file", "deleted": True}
        check_error(await w.client.get(f"/v1/files/{ids[0]}"), 404, "file_not_found")
        check_error(await w.client.get("/v1/files", params={"limit": 0}), 400)


async def test_a_file_belongs_to_its_tenant(world: MakeWorld) -> None:
    keys = [{"name": "a", "tenant": "t"}, {"name": "b", "tenant": "t"}, {"name": "c"}]
    async with world(keys=keys) as w:
        made = (await w.upload(PICTURE, headers=bearer("a"))).json()["id"]
        content = [{"type": "file", "file": {"file_id": made}}]
        assert (await w.ask(content, headers=bearer("b"))).status_code == 200
        for path in (f"/v1/files/{made}", f"/v1/files/{made}/content"):
            check_error(await w.client.get(path, headers=bearer("c")), 404, "file_not_found")
        check_error(await w.client.delete(f"/v1/files/{made}", headers=bearer("c")), 404)
        check_error(await w.ask(content, headers=bearer("c")), 404, "file_not_found")
        assert (await w.client.get("/v1/files", headers=bearer("c"))).json()["data"] == []
        assert len((await w.client.get("/v1/files", headers=bearer("b"))).json()["data"]) == 1


async def test_a_file_that_is_no_medium_is_not_kept(world: MakeWorld) -> None:
    async with world() as w:
        check_error(await w.upload(b"#!/bin/sh\n" * 100), 415, "media_unsupported")
        await asyncio.sleep(0.05)
        assert w.gateway.media.store.used_bytes == 0
        assert (await w.client.get("/v1/files")).json()["data"] == []


async def test_media_bytes_a_minute_are_limited_for_each_key(world: MakeWorld) -> None:
    keys = [{"name": "a", "media_bytes_per_minute": 2 * len(PICTURE) + 10}]
    async with world(keys=keys) as w:
        codes = [(await w.upload(PICTURE, headers=bearer("a"))).status_code for _ in range(3)]
        assert codes == [200, 200, 429]
        refused = await w.ask(part("image_url", data_url(PICTURE)), headers=bearer("a"))
        check_error(refused, 429, "rate_limit_exceeded")
        assert refused.headers["retry-after"]


async def upload_slowly(w: World, data: bytes) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
        yield head + data
        await asyncio.sleep(30)

    await w.client.post(
        "/v1/files",
        content=chunks(),
        headers={"content-type": "multipart/form-data; boundary=x"},
    )


async def test_an_upload_that_is_given_up_leaves_nothing(world: MakeWorld) -> None:
    async with world(request={"body_timeout_s": 0.5}) as w:
        task = asyncio.create_task(upload_slowly(w, bytes(3 << 20)))
        await asyncio.sleep(0.3)
        assert w.gateway.media.store.used_bytes == 3 << 20
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0.5)
        assert w.gateway.media.store.used_bytes == 0
