"""HTTP framing of the gateway's server."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from tests.gateway.conftest import MakeWorld
from tests.gateway.raw_http import (
    AUTH,
    CHUNKED,
    HEALTH,
    POST,
    answers,
    body,
    chunk,
    connected,
    statuses,
    with_length,
)

pytestmark = pytest.mark.anyio

KEYS: list[dict[str, Any]] = [{"name": "a"}]
LAST = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


# -- framing ----------------------------------------------------------------------------------


async def test_a_trailer_does_not_authenticate(world: MakeWorld) -> None:
    request = POST + CHUNKED + chunk(body()) + b"0\r\n" + AUTH + b"\r\n"
    async with world(keys=KEYS) as w:
        assert statuses(await answers(w.now.port, request + LAST)) == [401, 200]


async def test_chunks_with_extensions_and_trailers_are_read(world: MakeWorld) -> None:
    chunks = b"".join(chunk(body()[i : i + 1], b";a=b") for i in range(len(body())))
    request = POST + AUTH + CHUNKED + chunks + b"0\r\nX-Sum: 1\r\n\r\n"
    async with world(keys=KEYS) as w:
        assert statuses(await answers(w.now.port, request + LAST)) == [200, 200]


@pytest.mark.parametrize("split", [False, True])
async def test_a_request_that_asks_for_an_upgrade_keeps_its_body(
    world: MakeWorld, split: bool
) -> None:
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n"
    head = POST + AUTH + upgrade
    async with world(keys=KEYS) as w, connected(w.now.port) as client:
        whole = head + with_length(body())
        cut = len(head) + 20 if split else len(whole)
        await client.send(whole[:cut])
        await asyncio.sleep(0.1 if split else 0)
        await client.send(whole[cut:])
        assert b" 200 OK" in await client.until(b"\r\n\r\n")
        assert len(w.engine.requests) == 1
        # Neither is the body a request, nor is the connection lost to the next one.
        hidden = with_length(b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n")
        await client.send(head + hidden + LAST)
        assert statuses(await client.rest()) == [400, 200]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_of_http_1_0_gets_no_chunks(world: MakeWorld, stream: bool) -> None:
    request = POST.replace(b"HTTP/1.1", b"HTTP/1.0") + AUTH + with_length(body(stream=stream))
    async with world(keys=KEYS) as w:
        received = await answers(w.now.port, request)
        head, _, content = received.partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower()
        assert b"connection: close" in head.lower()
        if stream:
            assert content.startswith(b"data: {")
            assert content.endswith(b"data: [DONE]\n\n")
        else:
            assert json.loads(content)["object"] == "chat.completion"


async def test_100_continue_is_sent_only_if_the_body_is_read(
    world: MakeWorld,
) -> None:
    expecting = b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body())
    async with world(keys=KEYS) as w, connected(w.now.port) as client:
        await client.send(POST + AUTH + expecting)
        assert await client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(body() + POST + expecting)
        assert statuses(await client.rest()) == [200, 401]


async def test_a_refusal_keeps_the_connection_if_the_body_has_arrived(world: MakeWorld) -> None:
    async with world(keys=KEYS) as w:
        received = await answers(w.now.port, POST + with_length(body()) + LAST)
        assert statuses(received) == [401, 200]


async def test_requests_are_not_read_after_one_that_closes_the_connection(
    world: MakeWorld,
) -> None:
    async with world(keys=KEYS) as w:
        assert statuses(await answers(w.now.port, LAST + HEALTH)) == [200]


UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
CHUNKS = CHUNKED + chunk(body()[:9], b";a=b") + chunk(body()[9:]) + b"0\r\nX: y\r\n\r\n"
REQUESTS = [
    HEALTH,
    b"\r\n" + HEALTH,
    POST + with_length(body()),
    POST + with_length(body(stream=True)),
    POST + CHUNKS,
    POST + UPGRADE + with_length(body()),
    POST + UPGRADE + CHUNKS,
    b"HEAD /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
]


async def test_answers_do_not_depend_on_the_pieces_that_requests_come_in(
    world: MakeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = random.Random(0)
    async with world() as w:
        for _ in range(40):
            data = b"".join(chosen.choices(REQUESTS, k=chosen.randint(1, 6))) + LAST
            whole = statuses(await answers(w.now.port, data))
            async with connected(w.now.port) as client:
                while data:
                    length = chosen.choice([1, 7, 100, 1_000])
                    await client.send(data[:length])
                    data = data[length:]
                    await asyncio.sleep(0)
                assert statuses(await client.rest()) == whole
            assert whole[-1] == 200
    assert not [record for record in caplog.records if record.exc_info]
