"""Answers that are not streamed and too large to be held, as log probabilities make them."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from aiohttp import web

from tests.gateway.conftest import MakeWorld, World
from tests.gateway.mock_upstream import MODEL, MockUpstream
from tests.gateway.test_api import check_error

pytestmark = pytest.mark.anyio

HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]}


@dataclass
class Large(MockUpstream):
    """Answers with large JSON, as log probabilities make it."""

    nbytes: int = 0
    breaks_at: int = 0
    sent: int = 0
    status: int = 200

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        choice = {"index": 0, "message": {"content": 'x "usage":{"completion_tokens":9}'}}
        answer = {"choices": [choice], "usage": self.usage, "logprobs": "x" * self.nbytes}
        data = json.dumps(answer, separators=(",", ":")).encode()
        response = web.StreamResponse(status=self.status)
        response.content_type = "application/json"
        response.content_length = len(data)
        await response.prepare(request)
        for start in range(0, len(data), 100_000):
            if 0 < self.breaks_at <= start:
                assert request.transport is not None
                request.transport.abort()
                break
            await response.write(data[start : start + 100_000])
            self.sent = start
        return response


def completion_tokens(w: World) -> float:
    (metric,) = w.gateway.metrics.completion_tokens.collect()
    return metric.samples[0].value


@pytest.mark.parametrize("nbytes", [0, 60_000, 70_000, 2**23])
async def test_an_answer_of_any_size_arrives_whole_and_is_counted(
    world: MakeWorld, nbytes: int
) -> None:
    async with world([Large(nbytes=nbytes)]) as w:
        answer = await w.ask()
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"
        assert answer.json()["logprobs"] == "x" * nbytes
        assert completion_tokens(w) == 5


async def test_a_large_answer_that_nobody_reads_stays_in_the_engine(world: MakeWorld) -> None:
    engine = Large(nbytes=2**26)
    async with (
        world([engine], routing={"idle_timeout_s": 30}) as w,
        w.client.stream("POST", "/v1/chat/completions", json=HELLO) as answer,
    ):
        before = -1
        while engine.sent != before:
            before = engine.sent
            await asyncio.sleep(0.5)
        assert 0 < engine.sent < 2**25  # what the kernel holds for two connections, too
        assert len(json.loads(await answer.aread())["logprobs"]) == 2**26


async def test_a_large_answer_that_breaks_off_ends_with_its_connection(world: MakeWorld) -> None:
    async with world([Large(nbytes=2**23, breaks_at=2**22)]) as w:
        with pytest.raises(httpx.RemoteProtocolError):
            await w.ask()
        (failures,) = w.gateway.metrics.upstream_failures.collect()
        assert {sample.labels["reason"] for sample in failures.samples} == {"broken_mid_stream"}
        w.engine.breaks_at = 0  # type: ignore[attr-defined]
        assert (await w.ask()).status_code == 200


async def test_a_large_refusal_is_a_refusal(world: MakeWorld) -> None:
    engine = Large(nbytes=2**22, status=400)
    async with world([engine]) as w:
        check_error(await w.ask(), 400, "refused_by_engine")
        assert len(engine.requests) == 1
