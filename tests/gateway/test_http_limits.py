"""Limits of the gateway's HTTP server: pipelining, floods and connections."""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from ep_serve.gateway.http import protocol, write_watchdog
from ep_serve.gateway.http.client_connections import STARTS, FairScheduler
from ep_serve.gateway.server import running
from ep_serve.gateway.settings import load
from tests.gateway.conftest import MakeWorld, World, bearer
from tests.gateway.raw_http import (
    AUTH,
    GET,
    HEALTH,
    POST,
    body,
    connected,
    statuses,
    with_length,
)

pytestmark = pytest.mark.anyio

KEYS: list[dict[str, Any]] = [{"name": "a"}]
TWO_KEYS = [{"name": "a"}, {"name": "b"}]


async def eventually(what: str, true: Any) -> None:
    """Wait until a function returns something true."""
    for _ in range(1_000):
        if true():
            return
        await asyncio.sleep(0.02)
    pytest.fail(f"never: {what}")


def refused(w: World) -> dict[str, float]:
    """Connections that were refused, by reason."""
    samples = next(iter(w.gateway.metrics.connections_refused.collect())).samples
    return {s.labels["reason"]: s.value for s in samples if s.name.endswith("_total")}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


# -- floods -----------------------------------------------------------------------------------


async def test_a_few_requests_may_be_pipelined_and_then_the_connection_closes(
    world: MakeWorld,
) -> None:
    asked = POST + AUTH + with_length(body())
    async with world() as w, connected(w.now.port) as client:
        w.engine.gate = asyncio.Event()
        await client.send(POST + with_length(body(stream=True)))
        await eventually("the engine answers", lambda: w.engine.running)
        await client.send(asked * 1_000)
        await eventually("too many", lambda: refused(w).get("invalid_http"))
        w.engine.gate.set()
        # Their answers come in order, and none is lost.
        received = await client.rest()
        assert statuses(received) == [200] * (1 + protocol.MAX_PIPELINED) + [400]
        assert received.index(b"[DONE]") < received.index(b'chat.completion"')


async def test_pipelined_bodies_of_all_connections_are_bounded(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "MAX_QUEUED_BYTES", 100_000)
    async with world() as w, AsyncExitStack() as stack:
        w.engine.gate = asyncio.Event()
        clients = [await stack.enter_async_context(connected(w.now.port)) for _ in range(4)]
        for number, client in enumerate(clients):
            await client.send(POST + with_length(body(stream=True)))
            await eventually("all run", lambda: w.engine.running == number + 1)  # noqa: B023
        for client in clients:
            await client.send(POST + b"Content-Length: 10000000\r\n\r\n" + bytes(60_000))
        await eventually("too much", lambda: refused(w).get("invalid_http", 0) >= 2)
        w.engine.gate.set()
        ends = [await client.until(b"[DONE]") for client in clients]
        assert all(statuses(end) == [200] for end in ends)


@pytest.mark.parametrize(
    "endless", [b"GET /health HTTP/1.1\r\nHost: a\r\nX: ", b"GET /", b"\r\n", b"\x16\x03\x01"]
)
async def test_a_head_without_end_while_an_answer_runs_is_not_kept(
    world: MakeWorld, endless: bytes
) -> None:
    async with world() as w, connected(w.now.port) as client:
        w.engine.gate = asyncio.Event()
        await client.send(POST + with_length(body(stream=True)))
        await eventually("the engine answers", lambda: w.engine.running)
        await client.send(endless)
        sending = asyncio.create_task(client.send(endless * (40_000_000 // len(endless))))
        # It is read no more; the rest waits in the client.
        await eventually("a refusal", lambda: refused(w))
        await asyncio.sleep(0.3)
        assert not sending.done()
        w.engine.gate.set()
        received = await client.rest()
        await sending
        answer, error = received.split(b"[DONE]\n\n\r\n0\r\n\r\n")
        assert statuses(answer) == [200]
        assert statuses(error) in ([400], [414], [431])


@pytest.mark.parametrize("pipelined", [b"", HEALTH, HEALTH * 3])
async def test_a_disconnect_ends_a_response_whatever_is_pipelined(
    world: MakeWorld, pipelined: bytes
) -> None:
    async with world(routing={"idle_timeout_s": 60}) as w:
        w.engine.mode = "stall"
        async with connected(w.now.port) as client:
            await client.send(POST + with_length(body(stream=True)) + pipelined)
            await client.until(b"data: ")
        await eventually("the engine is told", lambda: w.engine.cancelled == 1)


async def test_a_client_that_reads_nothing_is_disconnected(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_watchdog, "WRITE_TIMEOUT_S", 0.3)
    async with world(playground={"enabled": True}) as w, connected(w.now.port) as client:
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        page = b"GET /playground HTTP/1.1\r\nHost: a\r\n\r\n"

        async def ask() -> None:
            while True:
                client.writer.write(page)
                await asyncio.sleep(0.001)

        asking = asyncio.create_task(ask())
        await eventually("it is cut off", lambda: refused(w).get("write_timeout") == 1)
        asking.cancel()
        front: Any = w.now.front
        await eventually("its request has ended", lambda: not front.server_state.tasks)
        assert not front.server_state.connections


async def test_a_burst_of_requests_does_not_hold_up_other_senders() -> None:
    requests, started = FairScheduler(), list[str]()
    for _ in range(1_000):
        requests.start(lambda: "many", partial(started.append, "many"))
    requests.start(lambda: "one", partial(started.append, "one"))
    while "one" not in started:
        await asyncio.sleep(0)
    assert len(started) <= 3 * STARTS
    while len(started) < 1_001:
        await asyncio.sleep(0)
    requests.start(lambda: "many", partial(started.append, "many"))
    assert len(started) == 1_002  # at once, when nothing waits


async def test_a_request_that_fails_to_start_does_not_stop_the_others() -> None:
    requests, started = FairScheduler(), list[int]()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)

    def start(number: int) -> None:
        if number == STARTS:
            raise ValueError
        started.append(number)

    for number in range(3 * STARTS):
        requests.start(lambda: "one", partial(start, number))
    for _ in range(9):
        await asyncio.sleep(0)
    assert len(started) == 3 * STARTS - 1


@pytest.mark.parametrize(("keys", "tenants"), [(TWO_KEYS, {"a", "b", None}), (None, {"anonymous"})])
async def test_only_valid_keys_count_as_separate_senders(
    world: MakeWorld, monkeypatch: pytest.MonkeyPatch, keys: Any, tenants: set[str | None]
) -> None:
    senders = set[Any]()

    def start(_: FairScheduler, sender: Callable[[], Any], action: Callable[[], None]) -> None:
        senders.add(sender())
        action()

    monkeypatch.setattr(FairScheduler, "start", start)
    async with world(keys=keys) as w:
        await w.client.get("/v1/models")
        for key in [bearer("a"), bearer("b"), *({"authorization": f"Bearer {n}"} for n in "xyz")]:
            await w.client.get("/v1/models", headers=key)
    assert senders == {("127.0.0.1", tenant) for tenant in tenants}


def test_new_connections_are_accepted_in_few_turns_of_the_event_loop(tmp_path: Path) -> None:
    options = {
        "upstreams": ["http://127.0.0.1:1"],
        "port": 0,
        "store": {"path": tmp_path / "store"},
        "metrics": {"enabled": False},
        "drain": {"delay_s": 0},
    }

    async def turns(count: int) -> int:
        async with running(load(None, options)) as now, AsyncExitStack() as stack:
            front: Any = now.front
            for _ in range(count):
                sock = stack.enter_context(socket.socket())
                sock.connect(("127.0.0.1", now.port))
            turn = 0
            while len(front.server_state.connections) < count:
                await asyncio.sleep(0)
                turn += 1
            return turn

    assert uvloop.run(turns(64)) <= 24  # libuv accepts one a turn for each listening socket


# -- connections ------------------------------------------------------------------------------


@pytest.mark.parametrize("said", [b"", GET, HEALTH, POST + b"Content-Length: 9\r\n\r\n"])
async def test_waiting_connections_do_not_block_new_ones(world: MakeWorld, said: bytes) -> None:
    async with (
        world(keys=KEYS, request={"max_connections": 20, "header_timeout_s": 60}) as w,
        AsyncExitStack() as stack,
    ):
        front: Any = w.now.front
        for _ in range(80):
            client = await stack.enter_async_context(connected(w.now.port))
            await client.send(said)
        await eventually("some are closed", lambda: refused(w).get("connections", 0) >= 50)
        assert len(front.server_state.connections) <= 20
        assert (await w.client.get("/health")).status_code == 200
        assert (await w.ask(headers=bearer("a"))).status_code == 200


async def test_health_is_answered_while_all_connections_work(world: MakeWorld) -> None:
    async with world(keys=KEYS, request={"max_connections": 4}) as w, AsyncExitStack() as stack:
        w.engine.mode = "stall"
        for _ in range(4):
            await stack.enter_async_context(w.stream(headers=bearer("a")))
        assert (await w.client.get("/health")).status_code == 200
        assert (await w.client.get("/ready")).status_code == 200
        answer = await w.ask(headers=bearer("a"))
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "too_many_connections"
        assert answer.headers["retry-after"]


async def test_metrics_and_media_for_engines_are_read_past_silent_connections(
    world: MakeWorld,
) -> None:
    settings = {"metrics": {"enabled": True, "port": free_port()}}
    limits = {"max_connections": 20, "header_timeout_s": 60}
    async with world(request=limits, **settings) as w, AsyncExitStack() as stack:
        metrics = f"http://127.0.0.1:{settings['metrics']['port']}/metrics"
        media = f"{w.gateway.media.server.base_url}/media/x"
        for url in (metrics, media):
            for _ in range(80):
                await stack.enter_async_context(connected(httpx.URL(url).port or 0))
        await eventually("some are closed", lambda: refused(w).get("connections", 0) >= 120)
        answer = await w.client.get(metrics)
        assert answer.headers["content-type"].startswith("text/plain")
        assert 'connections_refused_total{reason="connections"}' in answer.text
        assert (await w.client.get(media)).status_code == 404


def test_a_gateway_may_open_as_many_files_as_its_connections_need_or_takes_fewer() -> None:
    code = """
import resource
from ep_serve.gateway.server import _with_open_files
from ep_serve.gateway.settings import GatewaySettings
for connections, allowed in ((500, 3_000), (5_000, 3_000), (100, 1_024)):
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, allowed))
    given = {"upstreams": ["http://localhost"], "request": {"max_connections": connections}}
    settings = _with_open_files(GatewaySettings.model_validate(given))
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], settings.request.max_connections)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2024", "500", "3000", "988", "1024", "100"]
    assert "request.max_connections is 988 instead of 5000" in done.stderr


async def test_uvicorn_has_what_the_protocol_takes_from_it() -> None:
    config = uvicorn.Config(lambda: None)
    protocol = HttpToolsProtocol(config=config, server_state=ServerState(), app_state={})
    assert vars(protocol).keys() >= {
        *("access_log", "access_logger", "app", "connections", "cycle", "expect_100_continue"),
        *("flow", "headers", "logger", "loop", "parser", "pipeline", "scope", "server_state"),
        *("tasks", "timeout_keep_alive", "transport"),
    }
    assert vars(protocol.server_state).keys() == {
        "total_requests",
        "connections",
        "tasks",
        "default_headers",
    }
    assert list(inspect.signature(HttpToolsProtocol._start_asgi_task).parameters) == [
        "self",
        "cycle",
        "app",
    ]
    parameters = inspect.signature(RequestResponseCycle).parameters
    assert list(parameters) == [
        *("scope", "transport", "flow", "logger", "access_logger", "access_log"),
        *("default_headers", "message_event", "expect_100_continue", "keep_alive", "on_response"),
    ]
    cycle = RequestResponseCycle(**dict.fromkeys(parameters))  # type: ignore[arg-type]
    assert vars(cycle).keys() >= {
        *("chunked_encoding", "disconnected", "expected_content_length", "keep_alive"),
        *("message_event", "more_body", "response_complete", "response_started", "scope"),
    }
