"""Which engine gets a request, and who waits."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from yarl import URL

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.metrics import Metrics
from ep_serve.gateway.routing import Demand, Router, rendezvous
from ep_serve.gateway.settings import GatewaySettings, QueueSettings, RoutingSettings, load
from ep_serve.gateway.tracing import Tracing
from ep_serve.gateway.upstreams import Upstream, Upstreams
from tests.gateway.conftest import MakeWorld
from tests.gateway.mock_upstream import MockUpstream
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
    upstreams = Upstreams(settings, Metrics())
    made = []
    for number in range(engines):
        address = f"10.0.0.{number + 1}"
        upstream = Upstream(URL("http://engine:8000"), address, routing)
        upstream.checked(True)
        upstreams._known[URL("http://engine:8000"), address] = upstream
        made.append(upstream)
    return Router(upstreams, settings, Metrics(), Tracing()), made


async def test_requests_without_media_go_where_the_least_work_is() -> None:
    router, engines = make_router()
    for _ in range(9):
        await router.take(Demand("m"))
    assert [engine.active for engine in engines] == [3, 3, 3]


async def test_questions_about_one_medium_meet_one_engine() -> None:
    router, _ = make_router()
    for number in range(20):
        demand = Demand("m", affinity=f"clip{number}")
        first = await router.take(demand)
        router.release(first, demand, failed=False)
        for _ in range(3):
            again = await router.take(demand)
            assert again is first
            router.release(again, demand, failed=False)


async def test_a_popular_medium_does_not_overload_its_engine() -> None:
    router, engines = make_router(routing=RoutingSettings(load_bound=1.25))
    for _ in range(300):
        await router.take(Demand("m", affinity="popular"))
    assert max(engine.active for engine in engines) <= 1.25 * 100 + 2


async def test_the_loss_of_an_engine_moves_only_its_own_media() -> None:
    _, engines = make_router(engines=5)
    keys = [f"clip{number}" for number in range(200)]
    before = {key: rendezvous(key, engines)[0] for key in keys}
    after = {key: rendezvous(key, engines[1:])[0] for key in keys}
    assert all(after[key] is before[key] for key in keys if before[key] is not engines[0])
    assert min(Counter(one.name for one in before.values()).values()) > 20


async def test_who_waits_longest_goes_first_unless_another_has_priority() -> None:
    router, _ = make_router(1, RoutingSettings(concurrency=1))
    first = Demand("m")
    engine = await router.take(first)
    order: list[str] = []

    async def wait(name: str, priority: int) -> None:
        demand = Demand("m", priority=priority)
        taken = await router.take(demand)
        order.append(name)
        router.release(taken, demand, failed=False)

    tasks = []
    for name, priority in (("a", 0), ("b", 0), ("c", 1)):
        tasks.append(asyncio.create_task(wait(name, priority)))
        await asyncio.sleep(0)
    router.release(engine, first, failed=False)
    await asyncio.gather(*tasks)
    assert order == ["c", "a", "b"]
    assert engine.active == 0


async def test_a_queue_has_an_end_and_patience_has_one_too() -> None:
    queue = QueueSettings(max_waiting=1, timeout_s=0.1)
    router, _ = make_router(1, RoutingSettings(concurrency=1), queue)
    await router.take(Demand("m"))
    waiting = asyncio.create_task(router.take(Demand("m")))
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as full:
        await router.take(Demand("m"))
    with pytest.raises(ApiError) as late:
        await waiting
    for error in (full.value, late.value):
        assert error.status == 429
        assert error.retry_after


async def test_who_gives_up_waiting_leaves_no_trace() -> None:
    router, engines = make_router(1, RoutingSettings(concurrency=1))
    first = Demand("m")
    engine = await router.take(first)
    waiting = asyncio.create_task(router.take(Demand("m")))
    await asyncio.sleep(0)
    router.release(engine, first, failed=False)  # the place is given ...
    waiting.cancel()  # ... to somebody who leaves at the same moment
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert engines[0].active == 0
    assert await router.take(first)


async def test_an_engine_that_fails_is_left_alone_until_a_trial_succeeds() -> None:
    routing = RoutingSettings(breaker_failures=2, breaker_reset_s=0.1)
    router, (engine,) = make_router(1, routing)
    for _ in range(2):
        await router.take(Demand("m"))
        router.release(engine, Demand("m"), failed=True)
    with pytest.raises(ApiError) as error:
        await router.take(Demand("m"))
    assert error.value.status == 503
    await asyncio.sleep(0.12)
    await router.take(Demand("m"))
    assert not engine.available  # one trial at a time
    router.release(engine, Demand("m"), failed=False)
    assert engine.available


async def test_an_engine_behind_a_name_is_found_again_when_its_address_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = load(None, {"upstreams": ["http://engines.test:8000"]})
    upstreams = Upstreams(settings, Metrics())
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
    assert first.retired
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
