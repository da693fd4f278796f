"""Which engine gets a request, and who waits."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress

import pytest
from yarl import URL

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.metrics import Metrics
from ep_serve.gateway.settings import GatewaySettings, QueueSettings, RoutingSettings, load
from ep_serve.gateway.tracing import Tracing
from ep_serve.gateway.upstream.circuit import Outcome
from ep_serve.gateway.upstream.pool import Upstream, UpstreamPool
from ep_serve.gateway.upstream.router import Demand, Router, rendezvous
from tests.gateway.conftest import MakeWorld
from tests.gateway.mock_upstream import MODEL, MockUpstream
from tests.gateway.test_api import check_error

pytestmark = pytest.mark.anyio


def make_router(
    engines: int = 3,
    routing: RoutingSettings | None = None,
    queue: QueueSettings | None = None,
) -> tuple[Router, list[Upstream]]:
    routing = routing or RoutingSettings()
    settings: GatewaySettings = load(None, {"upstreams": ["http://127.0.0.1:1"]})
    changed = {"routing": routing, "queue": queue or QueueSettings()}
    settings = settings.model_copy(update=changed)
    upstreams = UpstreamPool(settings, Metrics())
    made = []
    for number in range(engines):
        address = f"10.0.0.{number + 1}"
        upstream = Upstream(URL("http://engine:8000"), address, routing)
        upstream.record_health_check(True)
        upstreams._known[URL("http://engine:8000"), address] = upstream
        made.append(upstream)
    return Router(upstreams, settings, Metrics(), Tracing()), made


async def test_requests_without_media_go_where_the_least_work_is() -> None:
    router, engines = make_router()
    for _ in range(9):
        await router.acquire(Demand("m"))
    assert [engine.active for engine in engines] == [3, 3, 3]


async def test_questions_about_one_medium_meet_one_engine() -> None:
    router, _ = make_router()
    for number in range(20):
        demand = Demand("m", affinity=f"clip{number}")
        first = await router.acquire(demand)
        router.release(first, demand, Outcome.SUCCEEDED)
        for _ in range(3):
            again = await router.acquire(demand)
            assert again is first
            router.release(again, demand, Outcome.SUCCEEDED)


async def test_a_popular_medium_does_not_overload_its_engine() -> None:
    router, engines = make_router(routing=RoutingSettings(load_bound=1.25))
    for _ in range(300):
        await router.acquire(Demand("m", affinity="popular"))
    assert max(engine.active for engine in engines) <= 1.25 * 100 + 2


async def test_the_loss_of_an_engine_moves_only_its_own_media() -> None:
    _, engines = make_router(engines=5)
    keys = [f"clip{number}" for number in range(200)]
    before = {key: rendezvous(key, engines)[0] for key in keys}
    after = {key: rendezvous(key, engines[1:])[0] for key in keys}
    assert all(after[key] is before[key] for key in keys if before[key] is not engines[0])
    assert min(Counter(one.name for one in before.values()).values()) > 20


async def test_queued_requests_are_ordered_by_priority_and_arrival() -> None:
    router, _ = make_router(1, RoutingSettings(concurrency=1))
    first = Demand("m")
    engine = await router.acquire(first)
    order: list[str] = []

    async def wait(name: str, priority: int) -> None:
        demand = Demand("m", priority=priority)
        taken = await router.acquire(demand)
        order.append(name)
        router.release(taken, demand, Outcome.SUCCEEDED)

    tasks = []
    for name, priority in (("a", 0), ("b", 0), ("c", 1)):
        tasks.append(asyncio.create_task(wait(name, priority)))
        await asyncio.sleep(0)
    router.release(engine, first, Outcome.SUCCEEDED)
    await asyncio.gather(*tasks)
    assert order == ["c", "a", "b"]
    assert engine.active == 0


async def test_the_queue_has_a_length_limit_and_a_timeout() -> None:
    queue = QueueSettings(max_waiting=1, timeout_s=0.1)
    router, _ = make_router(1, RoutingSettings(concurrency=1), queue)
    await router.acquire(Demand("m"))
    waiting = asyncio.create_task(router.acquire(Demand("m")))
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as full:
        await router.acquire(Demand("m"))
    with pytest.raises(ApiError) as late:
        await waiting
    for error in (full.value, late.value):
        assert error.status == 429
        assert error.retry_after


async def test_a_cancelled_request_is_removed_from_the_queue() -> None:
    router, engines = make_router(1, RoutingSettings(concurrency=1))
    first = Demand("m")
    engine = await router.acquire(first)
    waiting = asyncio.create_task(router.acquire(Demand("m")))
    await asyncio.sleep(0)
    router.release(engine, first, Outcome.SUCCEEDED)  # the place is given ...
    waiting.cancel()  # ... to somebody who leaves at the same moment
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert engines[0].active == 0
    assert await router.acquire(first)


async def test_an_unreachable_engine_gets_no_requests_until_a_trial_succeeds() -> None:
    routing = RoutingSettings(breaker_failures=2, breaker_reset_s=0.1)
    router, (engine,) = make_router(1, routing)
    for _ in range(2):
        await router.acquire(Demand("m"))
        router.release(engine, Demand("m"), Outcome.UNRESPONSIVE)
    with pytest.raises(ApiError) as error:
        await router.acquire(Demand("m"))
    assert error.value.status == 503
    engine.record_health_check(True)
    assert not engine.is_available  # which a health check does not change
    assert engine.circuit.needs_trial
    engine.circuit.record_trial(False)
    assert not engine.circuit.needs_trial
    await asyncio.sleep(0.12)
    assert engine.circuit.needs_trial
    engine.circuit.record_trial(None)
    assert not engine.is_available
    engine.circuit.record_trial(True)
    assert engine.is_available


async def test_failures_in_a_row_cause_a_trial_and_nothing_else() -> None:
    router, (engine,) = make_router(1, RoutingSettings(breaker_failures=2))
    for outcome in (Outcome.FAILED, Outcome.SUCCEEDED, Outcome.FAILED, None, Outcome.FAILED):
        assert not engine.circuit.needs_trial
        await router.acquire(Demand("m"))
        router.release(engine, Demand("m"), outcome)
    assert engine.is_available
    assert engine.circuit.needs_trial
    engine.circuit.record_trial(False)
    assert not engine.is_available


async def test_a_request_for_a_full_model_does_not_block_other_models() -> None:
    router, (full, idle) = make_router(2, RoutingSettings(concurrency=1))
    full.models, idle.models = {"a": {}}, {"b": {}}
    first = Demand("a")
    await router.acquire(first)
    waiting = asyncio.create_task(router.acquire(first))
    await asyncio.sleep(0)
    assert await asyncio.wait_for(router.acquire(Demand("b")), 0.5) is idle
    router.release(full, first, Outcome.SUCCEEDED)
    assert await waiting is full


async def test_a_long_queue_costs_little_when_a_request_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    router, engines = make_router(engines=2, routing=RoutingSettings(concurrency=1))
    taken = [await router.acquire(Demand("m")) for _ in engines]
    waiting = [asyncio.create_task(router.acquire(Demand("m"))) for _ in range(200)]
    await asyncio.sleep(0)
    picked: list[Demand] = []
    pick = router._select

    def counted(demand: Demand, avoid: frozenset[str]) -> Upstream | None:
        picked.append(demand)
        return pick(demand, avoid)

    monkeypatch.setattr(router, "_select", counted)
    router.release(taken[0], Demand("m"), Outcome.SUCCEEDED)
    assert len(picked) == 2  # of the first, and of the next one, which finds no room
    await asyncio.wait_for(waiting[0], 1)
    for task in waiting:
        task.cancel()


async def test_a_request_that_excludes_an_engine_does_not_block_others() -> None:
    router, (failed, other) = make_router(2, RoutingSettings(concurrency=1))
    demand = Demand("m")
    await router.acquire(demand, frozenset({failed.name}))
    waiting = asyncio.create_task(router.acquire(demand, frozenset({failed.name})))
    await asyncio.sleep(0)
    assert await asyncio.wait_for(router.acquire(demand), 0.5) is failed
    router.release(other, demand, Outcome.SUCCEEDED)
    assert await waiting is other


async def test_a_queued_request_fails_with_503_when_no_engine_is_left() -> None:
    router, (engine,) = make_router(1, RoutingSettings(concurrency=1), QueueSettings(timeout_s=0.1))
    await router.acquire(Demand("m"))
    waiting = asyncio.create_task(router.acquire(Demand("m")))
    await asyncio.sleep(0)
    engine.mark_unhealthy()
    with pytest.raises(ApiError) as error:
        await waiting
    assert error.value.code == "no_upstream"


async def test_an_engine_behind_a_name_is_found_again_when_its_address_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = load(None, {"upstreams": ["http://engines.test:8000"]})
    upstreams = UpstreamPool(settings, Metrics())
    answers: list[list[str]] = [["10.0.0.1", "10.0.0.2"], ["10.0.0.2", "10.0.0.3"], []]

    async def lookup(*_: object, **__: object) -> list[tuple[object, ...]]:
        addresses = answers.pop(0)
        if not addresses:
            raise OSError
        return [(2, 1, 6, "", (address, 8000)) for address in addresses]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lookup)
    await upstreams.resolve()
    first, second = upstreams.all
    assert first.host_header == "engines.test:8000"
    await upstreams.resolve()
    assert first.is_retired
    assert [one.name for one in upstreams.all] == ["10.0.0.2:8000", "10.0.0.3:8000"]
    assert upstreams.all[0] is second
    await upstreams.resolve()  # the name service is down
    assert len(upstreams.all) == 2


async def test_requests_wait_for_an_engine_that_is_full(world: MakeWorld) -> None:
    engine = MockUpstream(interval_s=0.05)
    async with world([engine], routing={"concurrency": 2}) as w:
        answers = await asyncio.gather(*(w.ask() for _ in range(6)))
        assert [answer.status_code for answer in answers] == [200] * 6
        engine.interval_s = 0.4
        answers = await asyncio.gather(*(w.ask() for _ in range(3)))
        refused = [answer for answer in answers if answer.status_code != 200]
        assert len(refused) == 1
        check_error(refused[0], 429, "overloaded")
        assert int(refused[0].headers["retry-after"]) >= 1


MODELS = b'{"object":"list","data":[{"id":"mock"}]}'


async def answering_in_pieces(pieces: list[bytes], pause_s: float) -> asyncio.Server:
    """A server with such a `/v1/models`, each piece in a segment of its own."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                sent = pieces if head.startswith(b"GET /v1/models") else [b""]
                length = sum(map(len, sent))
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % length)
                for piece in sent:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause_s)
        writer.close()

    return await asyncio.start_server(handle, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("pieces", "pause_s", "healthy"),
    [
        ([MODELS[:7], MODELS[7:]], 0.05, True),
        ([MODELS, b" " * 2**20], 0.0, False),
        ([MODELS[:-2]], 0.0, False),
        ([b"[" * 2**19], 0.0, False),
        ([bytes([byte]) for byte in MODELS], 0.1, False),
    ],
    ids=["two segments", "too large", "cut short", "too deep", "too slow"],
)
async def test_a_list_of_models_is_read_whole_and_inside_bounds(
    pieces: list[bytes], pause_s: float, healthy: bool
) -> None:
    server = await answering_in_pieces(pieces, pause_s)
    port = server.sockets[0].getsockname()[1]
    options = {"upstreams": [f"http://127.0.0.1:{port}"], "routing": {"health_timeout_s": 1}}
    upstreams = UpstreamPool(load(None, options), Metrics())
    try:
        await upstreams.open()
        (upstream,) = upstreams.all
        assert upstream.is_healthy == healthy
        assert upstream.models == ({"mock": {"id": "mock"}} if healthy else None)
    finally:
        await upstreams.close()
        server.close()


async def test_an_engine_that_comes_back_with_other_models_is_noticed(world: MakeWorld) -> None:
    async with world() as w:
        assert (await w.ask(model=MODEL)).status_code == 200
        w.engine.models = ("other",)
        async with asyncio.timeout(10):
            while (await w.ask(model=MODEL)).status_code != 404:
                await asyncio.sleep(0.05)
        assert (await w.ask(model="other")).status_code == 200
        listed = (await w.client.get("/v1/models")).json()["data"]
        assert [entry["id"] for entry in listed] == ["other"]


async def test_a_health_check_does_not_follow_redirects(world: MakeWorld) -> None:
    async with MockUpstream() as elsewhere, world() as w:
        w.engine.redirect = f"{elsewhere.url}/health"
        async with asyncio.timeout(10):
            while w.gateway.is_ready:
                await asyncio.sleep(0.05)
        check_error(await w.ask(), 503, "no_upstream")
