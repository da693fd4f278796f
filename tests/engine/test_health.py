"""`/health` and an engine that hangs, under vLLM's own server."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from ep_serve.checkpoint.embedded import build
from ep_serve.engine.server import health
from ep_serve.engine.server.process import ServerProcess
from tests.clips import make_clip
from tests.engine.client import Client, text, user, video

TIMEOUT = 3.0


class StandIn:
    """What the watch uses of vLLM's `AsyncLLM`; its engines answer when they are let."""

    def __init__(self) -> None:
        self.unfinished = 0
        self.asked = 0
        self.answers = asyncio.Event()
        self.engine_core = self
        media, engine = SimpleNamespace(), SimpleNamespace(step_timeout_s=TIMEOUT)
        self.model_config = SimpleNamespace(media=media, engine=engine)

    def get_num_unfinished_requests(self) -> int:
        return self.unfinished

    async def call_utility_all_async(self, method: str) -> list[bool]:
        assert method == health.PING_METHOD
        self.asked += 1
        await self.answers.wait()
        return [False]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Any:
    clock = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: clock.seconds))
    monkeypatch.setattr(health, "Settings", SimpleNamespace(of=lambda config: config))
    return clock


def test_an_idle_engine_is_not_asked(now: Any) -> None:
    async def polls() -> tuple[list[float], int]:
        engine = StandIn()
        watch = health.StepWatch(engine)
        seen = []
        for _ in range(3):
            seen.append(watch.seconds())
            now.seconds += 1000
        return seen, engine.asked

    assert asyncio.run(polls()) == ([0, 0, 0], 0)


def test_a_step_that_does_not_end_is_timed_even_when_its_requests_were_given_up(now: Any) -> None:
    async def polls() -> list[float]:
        engine = StandIn()
        watch = health.StepWatch(engine)
        engine.unfinished = 1
        seen = [watch.seconds()]
        await asyncio.sleep(0)
        engine.unfinished = 0
        now.seconds += 50
        seen.append(watch.seconds())
        engine.answers.set()
        await asyncio.sleep(0.01)
        seen.append(watch.seconds())
        return seen

    assert asyncio.run(polls()) == [0, 50, 0]


def test_steps_that_end_are_never_late_however_long_the_requests_run(now: Any) -> None:
    async def polls() -> list[float]:
        engine = StandIn()
        engine.answers.set()
        engine.unfinished = 1
        watch = health.StepWatch(engine)
        seen = []
        for _ in range(4):
            seen.append(watch.seconds())
            now.seconds += 2 * TIMEOUT
            await asyncio.sleep(0.01)
        return seen

    assert asyncio.run(polls()) == [0, 0, 0, 0]


# -- a real server ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """VLLM's server without `ep-serve serve`, run as a script as its documentation shows."""
    folder = tmp_path_factory.mktemp("health")
    model = build(folder / "model")
    options = [
        *("--model", str(model)),
        *("--served-model-name", "golden"),
        *("--max-model-len", "2048"),
        *("--kv-cache-memory-bytes", str(256 << 20)),
        *("--limit-mm-per-prompt.audio", "0"),
        "--enforce-eager",
        *("--additional-config", json.dumps({"ep_serve": {"step_timeout_s": TIMEOUT}})),
    ]
    script = ("-m", "vllm.entrypoints.launchers.api_server.entry")
    with ServerProcess(model, options, log=folder / "log", module=script) as process:
        yield Client(process)


def status(server: Client) -> int:
    return httpx.get(f"{server.root}/health", timeout=30).status_code


def wait_for(server: Client, expected: int) -> None:
    deadline = time.monotonic() + 60
    while (found := status(server)) != expected:
        assert time.monotonic() < deadline, f"/health stays {found}"
        time.sleep(0.2)


@pytest.mark.engine
def test_vllms_own_server_takes_our_fields_and_reports_the_reduction(server: Client) -> None:
    question = user(video(make_clip(2, seed=3)), text("What is it?"))
    answer = server.ask(question, keep_ratio=0.5)
    assert answer.reduction["keep_ratio"] == 0.5


@pytest.mark.engine
def test_without_an_audio_tower_the_sound_of_a_clip_is_not_read(server: Client) -> None:
    reduction = server.ask(user(video(make_clip(2, seed=4)), text("What is it?"))).reduction
    assert reduction["video"]["full"] > 0
    assert reduction["audio"] == {"full": 0, "kept": 0}


@pytest.mark.engine
def test_an_idle_server_stays_healthy(server: Client) -> None:
    deadline = time.monotonic() + 1.5 * TIMEOUT
    while time.monotonic() < deadline:
        assert status(server) == 200
        time.sleep(0.2)


@pytest.mark.engine
def test_a_stopped_engine_fails_the_health_check_until_it_goes_on(server: Client) -> None:
    (engine,) = (
        child
        for child in psutil.Process(server.process.pid).children()
        if "EngineCore" in "".join(child.cmdline())
    )
    answers: list[int] = []
    body = {"messages": user(text("Hello")), "max_tokens": 1500, "ignore_eos": True}
    request = threading.Thread(
        target=lambda: answers.append(server.post(body, timeout=240).status_code)
    )
    before = server.metric("vllm:prompt_tokens_total")
    request.start()
    while server.metric("vllm:prompt_tokens_total") == before:
        time.sleep(0.05)
    engine.send_signal(signal.SIGSTOP)
    try:
        wait_for(server, 503)
    finally:
        engine.send_signal(signal.SIGCONT)
    wait_for(server, 200)
    request.join()
    assert answers == [200]
