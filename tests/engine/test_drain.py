"""How a process that is told to stop treats its requests; the engine is a stand-in here."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from ep_serve.engine.server import drain


class StandIn:
    """What the drain uses of vLLM's `AsyncLLM`."""

    def __init__(self) -> None:
        self.errored = False
        self.aborted: list[str] = []
        self.stopped_with: list[float | None] = []
        self.output_handler: asyncio.Task[None] | None = None
        self.output_processor = self
        self.request_states: dict[str, Any] = {}

    def get_num_unfinished_requests(self) -> int:
        return len(self.request_states)

    async def abort(self, requests: list[str], internal: bool) -> None:
        assert internal
        self.aborted += requests
        self.request_states.clear()


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(drain, "_requests", drain._Requests())
    monkeypatch.setattr(
        drain, "_original_shutdown", lambda engine, timeout: engine.stopped_with.append(timeout)
    )
    stand_in = StandIn()
    with asyncio.Runner() as runner:
        ready = threading.Event()
        end = asyncio.Event()

        async def serve() -> None:
            stand_in.output_handler = asyncio.current_task()
            ready.set()
            await end.wait()

        loop = runner.get_loop()
        thread = threading.Thread(target=runner.run, args=(serve(),))
        thread.start()
        ready.wait()
        yield stand_in
        loop.call_soon_threadsafe(end.set)
        thread.join()


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello")


def client() -> httpx.AsyncClient:
    app = drain.DrainMiddleware(
        Starlette(routes=[Route("/v1/models", hello), Route("/metrics", hello)])
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine")


def test_nothing_is_waited_for_when_nothing_runs(engine: StandIn) -> None:
    began = time.monotonic()
    drain._shutdown(engine, timeout=60)
    assert time.monotonic() - began < 30
    assert engine.stopped_with[0] > drain.ENGINE_EXIT_SECONDS  # type: ignore[operator]


def test_a_request_that_ends_in_time_is_not_aborted(engine: StandIn) -> None:
    engine.request_states["a"] = object()
    threading.Timer(0.2, engine.request_states.clear).start()
    drain._shutdown(engine, timeout=60)
    assert engine.aborted == []


def test_a_request_is_waited_for_before_it_reaches_the_engine(engine: StandIn) -> None:
    drain._requests.running = 1
    threading.Timer(0.2, setattr, (drain._requests, "running", 0)).start()
    began = time.monotonic()
    drain._shutdown(engine, timeout=60)
    assert time.monotonic() - began >= 0.2


def test_what_runs_for_too_long_is_aborted_before_the_engine_is_stopped(engine: StandIn) -> None:
    engine.request_states["a"] = object()
    drain._shutdown(engine, timeout=drain.TELL_SECONDS)
    assert engine.aborted == ["a"]
    assert engine.stopped_with == [drain.ENGINE_EXIT_SECONDS]


def test_a_dead_engine_is_not_waited_for(engine: StandIn) -> None:
    engine.request_states["a"] = object()
    engine.errored = True
    began = time.monotonic()
    drain._shutdown(engine, timeout=60)
    assert time.monotonic() - began < 30
    assert engine.aborted == []


def test_the_second_shutdown_only_stops(engine: StandIn) -> None:
    drain._shutdown(engine, timeout=60)
    engine.request_states["a"] = object()
    drain._shutdown(engine, timeout=60)
    assert engine.stopped_with[1] == 60


@pytest.mark.usefixtures("engine")
def test_requests_are_refused_and_metrics_served_while_stopping() -> None:
    async def ask() -> tuple[list[int], httpx.Response]:
        async with client() as http:
            before = await http.get("/v1/models")
            drain._requests.stopping.set()
            refused = await http.get("/v1/models")
            metrics = await http.get("/metrics")
        return [before.status_code, metrics.status_code], refused

    served, refused = asyncio.run(ask())
    assert served == [200, 200]
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["error"]["type"] == "ServiceUnavailableError"
    assert drain._requests.running == 0
