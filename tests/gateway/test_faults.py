"""Engines that fail in every way, and the end of the gateway itself."""

from __future__ import annotations

import asyncio
import errno
import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import MakeWorld, World, gateway_process
from tests.gateway.mock_upstream import MODEL, POISON, MockUpstream
from tests.gateway.test_api import check_error

pytestmark = pytest.mark.anyio


async def events(w: World, **fields: Any) -> tuple[int, list[Any]]:
    """Status and the events of a stream, decoded; the text "[DONE]" stays."""
    async with w.stream(**fields) as response:
        text = (await response.aread()).decode()
    if response.status_code != 200:
        return response.status_code, [json.loads(text)]
    assert text.endswith("\n\n")
    return 200, [json_event(event) for event in text.removesuffix("\n\n").split("\n\n")]


@pytest.mark.parametrize("mode", ["error", "die_before", "die_after_header", "hang", "busy"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_did_not_start_is_retried_on_another_engine(
    world: MakeWorld, mode: Any, stream: bool
) -> None:
    if mode == "die_after_header" and not stream:
        pytest.skip("only streams have a header of their own")
    async with world(2, routing={"first_byte_timeout_s": 0.3, "answer_timeout_s": 0.3}) as w:
        for bad in w.engines:
            bad.mode = mode
            for _ in range(2):
                status, found = (
                    await events(w) if stream else ((await w.ask()).status_code, ["[DONE]"])
                )
                assert status == 200
                assert found[-1] == "[DONE]"
            bad.mode = "ok"
        assert all(engine.requests for engine in w.engines)


@pytest.mark.parametrize(
    ("mode", "status"),
    [("error", 502), ("die_before", 502), ("hang", 504), ("busy", 429)],
)
async def test_when_every_engine_fails_the_client_learns_no_more_than_that(
    world: MakeWorld, mode: Any, status: int
) -> None:
    async with world(2, routing={"first_byte_timeout_s": 0.2, "answer_timeout_s": 0.2}) as w:
        for engine in w.engines:
            engine.mode = mode
        for stream in (False, True):
            answer = await w.ask(stream=stream)
            check_error(answer, status)
            for secret in ("secret", "10.0.0.7", "127.0.0.1", str(w.engine.port)):
                assert secret not in answer.text


@pytest.mark.parametrize("mode", ["error", "die_before", "hang"])
@pytest.mark.parametrize("engines", [1, 4])
async def test_a_request_that_engines_took_and_failed_reaches_two_of_them_once(
    world: MakeWorld, mode: Any, engines: int
) -> None:
    mocks = [MockUpstream(mode=mode) for _ in range(engines)]
    async with world(mocks, routing={"answer_timeout_s": 0.3, "health_interval_s": 60}) as w:
        assert (await w.ask()).status_code in (502, 504)
        assert Counter(len(engine.requests) for engine in mocks)[1] == min(2, engines)
        assert sum(len(engine.requests) for engine in mocks) == min(2, engines)


async def test_engines_that_accept_no_request_are_skipped(world: MakeWorld) -> None:
    mocks = [MockUpstream(mode="busy"), MockUpstream(mode="busy"), MockUpstream()]
    async with world(mocks) as w:
        assert [(await w.ask()).status_code for _ in range(6)] == [200] * 6


@pytest.mark.parametrize("mode", ["error", "die_before", "error_event"])
async def test_failed_requests_do_not_open_the_circuit(world: MakeWorld, mode: Any) -> None:
    mocks = [MockUpstream(poison=mode) for _ in range(2)]
    async with world(mocks) as w:
        for number in range(12):
            failed = await w.ask(f"{POISON} {number}", stream=mode == "error_event")
            assert failed.status_code == 502 or b'"error"' in failed.content
            assert all(one.is_available for one in w.gateway.upstreams.all)
            if number % 4 == 3:
                assert (await w.client.get("/ready")).status_code == 200
                assert (await w.ask()).status_code == 200


async def test_an_engine_that_fails_every_request_gets_none_until_a_trial_succeeds(
    world: MakeWorld,
) -> None:
    async with world(2) as w:
        bad = w.engines[0]
        bad.mode = "error"
        while w.gateway.upstreams.all[0].is_available:
            assert (await w.ask()).status_code == 200
        seen = len(bad.requests)
        assert [(await w.ask()).status_code for _ in range(5)] == [200] * 5
        assert all(body.get("max_tokens") == 1 for body in bad.requests[seen:])  # trials
        bad.mode = "ok"
        await until(lambda: w.gateway.upstreams.all[0].is_available)


async def test_an_engine_that_hangs_is_not_ready_again_because_its_health_check_passes(
    world: MakeWorld,
) -> None:
    async with world(routing={"answer_timeout_s": 0.3, "first_byte_timeout_s": 0.3}) as w:
        w.engine.mode = "hang"
        for _ in range(3):
            check_error(await w.ask(), 504, "upstream_timeout")
        began = len(w.engine.requests)
        while len(w.engine.requests) < began + 3:  # trials that time out as well
            check_error(await w.client.get("/ready"), 503, "not_ready")
            await asyncio.sleep(0.1)
        check_error(await w.ask(), 503, "no_upstream")
        w.engine.mode = "ok"
        await until(lambda: w.gateway.is_ready)
        assert (await w.ask()).status_code == 200


async def test_streams_that_stall_together_show_that_an_engine_hangs(world: MakeWorld) -> None:
    async with world(routing={"idle_timeout_s": 0.3, "first_byte_timeout_s": 0.3}) as w:
        w.engine.mode = "stall"
        answers = await asyncio.gather(*(w.ask(stream=True) for _ in range(3)))
        assert all(b"upstream_error" in answer.content for answer in answers)
        assert not w.gateway.is_ready


async def test_requests_that_take_too_long_do_not_stop_an_engine_that_answers_others(
    world: MakeWorld,
) -> None:
    engine = MockUpstream(poison="hang", tokens=60, interval_s=0.05)
    async with world([engine], routing={"answer_timeout_s": 1.0}) as w:
        other = asyncio.create_task(events(w))
        while not w.gateway.upstreams.all[0].connections.last_received_at > 0:
            await asyncio.sleep(0.01)
        late = await asyncio.gather(*(w.ask(f"{POISON} {number}") for number in range(5)))
        assert {answer.status_code for answer in late} == {504}
        assert w.gateway.is_ready
        status, found = await other
        assert (status, len(found)) == (200, 61)


async def until(true: Any) -> None:
    async with asyncio.timeout(15):
        while not true():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("mode", ["die_mid", "half_event", "error_event", "stall"])
async def test_a_stream_that_breaks_off_ends_with_an_error_event(
    world: MakeWorld, mode: Any
) -> None:
    async with world(routing={"idle_timeout_s": 0.4}) as w:
        w.engine.mode = mode
        w.engine.interval_s = 0.02
        status, found = await events(w)
        assert status == 200
        *chunks, error, done = found
        assert done == "[DONE]"
        assert len(chunks) == 2
        assert all("choices" in chunk for chunk in chunks)
        assert set(error["error"]) == {"message", "type", "param", "code"}
        assert "secret" not in json.dumps(error)


async def test_the_deadline_ends_a_stream_with_an_error_event(world: MakeWorld) -> None:
    engine = MockUpstream(tokens=100, interval_s=0.1)
    async with world([engine], request_timeout_s=0.5) as w:
        _, found = await events(w)
        assert found[-2]["error"]["code"] == "deadline_exceeded"
        assert found[-1] == "[DONE]"
        check_error(await w.ask(), 504, "deadline_exceeded")
        await asyncio.sleep(0.2)
        assert not engine.running


async def no_socket(_: Any) -> bool:
    raise OSError(errno.EMFILE, "Too many open files")


async def no_time(_: Any) -> bool:
    time.sleep(0.7)
    await asyncio.sleep(5)
    return True


@pytest.mark.parametrize("check", [no_socket, no_time])
async def test_a_lack_of_local_resources_does_not_count_against_engines(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch, check: Any
) -> None:
    routing = {"health_timeout_s": 0.1, "health_interval_s": 60}
    async with world(1, routing=routing) as w:
        monkeypatch.setattr(w.gateway.upstreams, "_health", check)
        for _ in range(3):
            await w.gateway.upstreams.check()
        assert (await w.ask()).status_code == 200


async def test_an_engine_that_comes_back_is_used_again(world: MakeWorld) -> None:
    async with world(2) as w:
        first = w.engines[0]
        await first.stop()
        assert [(await w.ask()).status_code for _ in range(6)] == [200] * 6
        await asyncio.sleep(0.7)
        await first.start()
        await asyncio.sleep(0.7)
        seen = len(first.requests)
        await asyncio.gather(*(w.ask() for _ in range(6)))
        assert len(first.requests) > seen


PATIENT = {
    "connect_timeout_s": 30,
    "first_byte_timeout_s": 60,
    "idle_timeout_s": 60,
    "health_timeout_s": 30,
}
"""Nothing but a death ends a stream, however busy the machine is."""


async def test_one_of_three_engines_dies_under_64_streams(world: MakeWorld) -> None:
    gate = asyncio.Event()
    dies = MockUpstream(gate=asyncio.Event())
    others = [MockUpstream(gate=gate) for _ in range(2)]
    async with world([dies, *others], routing=PATIENT) as w:
        w.client.timeout = httpx.Timeout(60)
        began = asyncio.Semaphore(0)

        async def one() -> str:
            async with w.stream() as response:
                assert response.status_code == 200, await response.aread()
                text = ""
                async for piece in response.aiter_text():
                    if not text:
                        began.release()
                    text += piece
            *chunks, last, done = [json_event(event) for event in text.split("\n\n")[:-1]]
            assert done == "[DONE]"
            assert all("choices" in chunk for chunk in chunks)
            if "error" not in last:
                assert len(chunks) + 1 == dies.tokens
                return "whole"
            assert last["error"]["code"] == "upstream_error"
            return "broken"

        started = [asyncio.create_task(one()) for _ in range(64)]
        for _ in started:
            await began.acquire()
        cut = dies.running
        dies.mode = "hang"  # what it gets from now on does not start before it dies
        waiting = [asyncio.create_task(one()) for _ in range(32)]
        while dies.running == cut:
            await asyncio.sleep(0.01)
        await dies.stop()
        gate.set()
        late = [asyncio.create_task(one()) for _ in range(32)]
        ends = [await asyncio.gather(*tasks) for tasks in (started, waiting, late)]
    assert 0 < cut < 64
    assert Counter(ends[0]) == {"broken": cut, "whole": 64 - cut}
    assert set(ends[1] + ends[2]) == {"whole"}


def json_event(event: str) -> Any:
    data = event.removeprefix("data: ")
    return data if data == "[DONE]" else json.loads(data)


async def test_draining_is_visible_in_ready_and_interrupts_no_request(world: MakeWorld) -> None:
    engine = MockUpstream(tokens=20, interval_s=0.1)
    async with world([engine]) as w:
        running = [asyncio.create_task(events(w)) for _ in range(5)]
        await asyncio.sleep(0.3)
        draining = asyncio.create_task(w.now.drain())
        await asyncio.sleep(0.1)
        refused = await w.client.get("/ready")
        check_error(refused, 503, "not_ready")
        assert refused.headers["connection"] == "close"
        late = asyncio.create_task(events(w))  # sent before anybody took note
        for task in (*running, late):
            status, found = await task
            assert status == 200
            assert len(found) == 21
        await draining


async def test_sigterm_finishes_running_streams_and_exits_cleanly(tmp_path: Path) -> None:
    async with (
        MockUpstream(tokens=20, interval_s=0.1) as engine,
        gateway_process(tmp_path, engine) as (process, port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "x"}]}
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            process.send_signal(signal.SIGTERM)
            text = await response.aread()
        assert text.endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in text
        assert await asyncio.wait_for(process.wait(), 10) == 0
