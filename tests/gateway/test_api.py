"""The surface that clients see: paths, errors, ids, plain and streamed answers."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from tests.gateway.conftest import MakeWorld
from tests.gateway.mock_upstream import MODEL

pytestmark = pytest.mark.anyio


def check_error(response: httpx.Response, status: int, code: str | None = None) -> dict[str, str]:
    assert response.status_code == status, response.text
    error: dict[str, str] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    if code is not None:
        assert error["code"] == code
    return error


async def test_a_plain_answer_is_the_engines_own(world: MakeWorld) -> None:
    async with world() as w:
        through = await w.ask(temperature=0, an_unknown_field={"a": [1]})
        body = w.engine.requests[-1]
        direct = await w.client.post(f"{w.engine.url}/v1/chat/completions", json=body)
        assert through.status_code == 200
        assert through.content == direct.content
        assert body["an_unknown_field"] == {"a": [1]}


async def test_a_streamed_answer_is_the_engines_own_byte_for_byte(world: MakeWorld) -> None:
    async with world() as w:
        options = {"include_usage": True}
        async with w.stream(stream_options=options) as response:
            through = await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        direct = await w.client.post(
            f"{w.engine.url}/v1/chat/completions", json=w.engine.requests[-1]
        )
        assert through == direct.content
        assert through.endswith(b"data: [DONE]\n\n")


async def test_events_arrive_one_by_one(world: MakeWorld) -> None:
    async with world() as w:
        w.engine.interval_s = 0.1
        loop = asyncio.get_running_loop()
        async with w.stream() as response:
            times = [loop.time() async for line in response.aiter_lines() if line]
        assert times[-1] - times[0] > 0.3


async def test_only_the_known_paths_exist(world: MakeWorld) -> None:
    async with world() as w:
        for path in ("/metrics", "/tokenize", "/v1/completions", "/v1", "/media/x", "/"):
            check_error(await w.client.get(path), 404, "unknown_path")
        for path in ("/docs", "/redoc", "/openapi.json"):
            check_error(await w.client.get(path), 404, "unknown_path")
        check_error(await w.client.get("/v1/chat/completions"), 405, "method_not_allowed")
        assert not w.engine.requests


async def test_models_tell_nothing_about_the_engine(world: MakeWorld) -> None:
    async with world() as w:
        listed = (await w.client.get("/v1/models")).json()
        assert listed["data"] == [{"id": MODEL, "object": "model", "created": 1, "owned_by": "x"}]
        assert (await w.client.get(f"/v1/models/{MODEL}")).json() == listed["data"][0]
        check_error(await w.client.get("/v1/models/other/model"), 404, "model_not_found")


async def test_an_unknown_model_is_404(world: MakeWorld) -> None:
    async with world() as w:
        error = check_error(await w.ask(model="other"), 404, "model_not_found")
        assert error["param"] == "model"


async def test_a_request_id_goes_in_and_out(world: MakeWorld) -> None:
    async with world() as w:
        answer = await w.ask(headers={"x-request-id": "abc-1"})
        assert answer.headers["x-request-id"] == "abc-1"
        assert w.engine.headers[-1]["x-request-id"] == "abc-1"
        odd = await w.ask(headers={"x-request-id": "a b\tc" + "d" * 300})
        assert odd.headers["x-request-id"] == w.engine.headers[-1]["x-request-id"]
        assert len(odd.headers["x-request-id"]) == 32


async def test_trace_context_is_passed_on_or_begun(world: MakeWorld) -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    async with world() as w:
        await w.ask(headers={"traceparent": trace, "tracestate": "a=1"})
        assert w.engine.headers[-1]["traceparent"] == trace
        assert w.engine.headers[-1]["tracestate"] == "a=1"
        await w.ask(headers={"traceparent": "00-zz", "tracestate": "a=1"})
        assert len(w.engine.headers[-1]["traceparent"]) == 55
        assert "tracestate" not in w.engine.headers[-1]


async def test_no_header_of_the_client_reaches_the_engine(world: MakeWorld) -> None:
    async with world() as w:
        await w.ask(headers={"cookie": "a=b", "x-forwarded-for": "1.2.3.4"})
        assert not {"cookie", "x-forwarded-for", "authorization"} & w.engine.headers[-1].keys()


async def test_the_engines_refusal_reaches_the_client(world: MakeWorld) -> None:
    async with world() as w:
        w.engine.mode = "refuse"
        error = check_error(await w.ask(), 400)
        assert error["message"] == "The prompt is too long."
        assert error["param"] == "messages"
        async with w.stream() as response:
            await response.aread()
        check_error(response, 400)


async def test_health_and_readiness_differ(world: MakeWorld) -> None:
    async with world() as w:
        assert (await w.client.get("/ready")).status_code == 200
        await w.engine.stop()
        await asyncio.sleep(1)
        check_error(await w.client.get("/ready"), 503, "not_ready")
        assert (await w.client.get("/health")).status_code == 200
        refused = await w.ask()
        check_error(refused, 503, "no_upstream")
        assert int(refused.headers["retry-after"]) >= 1
        await w.engine.start()
        await asyncio.sleep(0.6)
        assert (await w.client.get("/ready")).status_code == 200
        assert (await w.ask()).status_code == 200


@pytest.mark.parametrize("mode", ["hang", "stall"])
async def test_a_client_that_goes_away_cancels_the_engine_within_a_second(
    world: MakeWorld, mode: str
) -> None:
    patient = {"first_byte_timeout_s": 60, "idle_timeout_s": 60}
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    async with world(routing=patient, request_timeout_s=120) as w:
        w.engine.mode = mode  # type: ignore[assignment]

        async def ask() -> None:
            given = {**body, "stream": mode == "stall"}
            async with httpx.AsyncClient(base_url=w.client.base_url, timeout=60) as client:
                await client.post("/v1/chat/completions", json=given)

        loop = asyncio.get_running_loop()
        times = []
        for number in range(3):  # a busy machine may be late once
            asking = asyncio.create_task(ask())
            while not w.engine.running:
                await asyncio.sleep(0.01)
            asking.cancel()
            gone = loop.time()
            while w.engine.running:
                await asyncio.sleep(0.01)
            times.append(loop.time() - gone)
            assert w.engine.cancelled == number + 1
        assert min(times) < 1, times


async def test_usage_of_the_reduction_is_counted(world: MakeWorld) -> None:
    async with world() as w:
        reduction = {"av_tokens_full": 100, "av_tokens_kept": 20}
        w.engine.usage = {"completion_tokens": 5, "reduction": reduction}
        await w.ask()
        async with w.stream(stream_options={"include_usage": True}) as response:
            await response.aread()
        value = w.gateway.metrics.registry.get_sample_value
        name = "ep_serve_gateway_av_tokens_total"
        assert [value(name, {"kind": k}) for k in ("full", "kept", "saved")] == [200, 40, 160]
        await asyncio.sleep(0.1)  # the count follows the last byte
        labels = {"route": "/v1/chat/completions", "code": "200"}
        assert value("ep_serve_gateway_requests_total", labels) == 2


async def test_errors_of_the_body_name_the_field(world: MakeWorld) -> None:
    async with world() as w:
        for fields, param in (
            ({"keep_ratio": 0}, "keep_ratio"),
            ({"keep_ratio": 1.5}, "keep_ratio"),
            ({"keep_ratio": True}, "keep_ratio"),
            ({"keep_ratio": "0.5"}, "keep_ratio"),
            ({"fps": -1}, "fps"),
            ({"rho_audio": 1.1}, "rho_audio"),
            ({"rho_video": False}, "rho_video"),
            ({"min_pixels": 1.5}, "min_pixels"),
            ({"min_pixels": 1_000_000_000}, "min_pixels"),
            ({"fps": 61}, "fps"),
            ({"min_pixels": 2000, "max_pixels": 1000}, "min_pixels"),
            ({"use_audio_in_video": 1}, "use_audio_in_video"),
            ({"stream": "yes"}, "stream"),
            ({"messages": []}, "messages"),
            ({"model": 5}, "model"),
            ({"mm_processor_kwargs": {}}, "mm_processor_kwargs"),
        ):
            error = check_error(await w.ask(**fields), 400)
            assert error["param"] == param, fields
            assert param in error["message"], fields
        assert not w.engine.requests
        assert (await w.ask(keep_ratio=1, fps=2, use_audio_in_video=False)).status_code == 200
        assert json.loads(json.dumps(w.engine.requests[-1]))["keep_ratio"] == 1
