"""A request that ends engines ends two of them; requests that were only near are served."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest

from ep_serve.gateway import logs
from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.metrics import Metrics
from ep_serve.gateway.upstream.quarantine import MAX_ENTRIES, Quarantine, logger
from ep_serve.gateway.upstream.relay import UpstreamRequest
from tests.clips import make_image
from tests.gateway.conftest import MakeWorld, World, bearer
from tests.gateway.mock_upstream import POISON, MockUpstream, Mode
from tests.gateway.test_api import check_error
from tests.gateway.test_media import data_url, part

pytestmark = pytest.mark.anyio

SLOW_CHECKS = {"health_interval_s": 60}
"""Nothing is found out by a health check."""


def poisoned(count: int, mode: Mode, **options: Any) -> list[MockUpstream]:
    return [MockUpstream(poison=mode, **options) for _ in range(count)]


def hit(w: World) -> int:
    """How many engines got the poisoned request."""
    return sum(any(POISON in str(body) for body in one.requests) for one in w.engines)


def counted(w: World, name: str, **labels: str) -> float:
    return w.gateway.metrics.registry.get_sample_value(f"ep_serve_gateway_{name}", labels) or 0.0


@pytest.mark.parametrize("mode", ["die", "die_before", "core_dies"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_crashes_two_engines_is_quarantined(
    world: MakeWorld,
    mode: Mode,
    stream: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logger, "disabled", False)  # import-linter's test disables all loggers
    caplog.handler.addFilter(logs._RequestId())
    keys = [{"name": "a"}, {"name": "b"}]
    async with world(poisoned(4, mode), keys=keys, routing=SLOW_CHECKS) as w:
        named = {**bearer("a"), "x-request-id": "the-one"}
        check_error(await w.ask(POISON, stream=stream, headers=named), 502, "upstream_error")
        assert hit(w) == 2
        for key in ("a", "b"):
            again = await w.ask(POISON, stream=stream, headers=bearer(key))
            check_error(again, 422, "request_quarantined")
            assert int(again.headers["retry-after"]) > 200
        assert hit(w) == 2
        for _ in range(4):
            assert (await w.ask(headers=bearer("b"))).status_code == 200
        assert counted(w, "quarantined_total") == 1
        assert counted(w, "refused_total", limit="quarantine") == 2
    (told,) = [one for one in caplog.records if one.levelno == logging.ERROR]
    assert "quarantined" in told.message
    assert vars(told)["request_id"] == "the-one"


async def test_a_request_that_crashes_engines_in_the_middle_of_its_answer_is_quarantined_too(
    world: MakeWorld,
) -> None:
    async with world(poisoned(3, "die_mid"), routing=SLOW_CHECKS) as w:
        for _ in range(2):
            answer = await w.ask(POISON, stream=True)
            assert answer.status_code == 200
            assert b'"upstream_error"' in answer.content
            await asyncio.sleep(2.1)  # or it would be the same break
        check_error(await w.ask(POISON, stream=True), 422, "request_quarantined")


async def test_a_restart_between_two_crashes_changes_nothing(world: MakeWorld) -> None:
    async with world(poisoned(1, "die")) as w:
        for _ in range(2):
            check_error(await w.ask(POISON), 502)
            await w.engine.stop()
            await until_ready(w, ready=False)
            await w.engine.start()
            await until_ready(w)
        check_error(await w.ask(POISON), 422, "request_quarantined")
        assert (await w.ask()).status_code == 200


async def test_an_error_of_an_engine_that_goes_on_quarantines_nobody(world: MakeWorld) -> None:
    async with world(poisoned(2, "error")) as w:
        for _ in range(5):
            check_error(await w.ask(POISON), 502, "upstream_error")
        assert not counted(w, "quarantined_total")


async def test_what_ran_beside_a_poisoned_request_is_answered_when_it_comes_again(
    world: MakeWorld,
) -> None:
    gate = asyncio.Event()
    async with world(poisoned(4, "die", gate=gate), routing=SLOW_CHECKS) as w:
        honest = [f"question {number}" for number in range(12)]
        beside = [asyncio.create_task(w.ask(text, stream=True)) for text in honest]
        while sum(one.running for one in w.engines) < len(honest):
            await asyncio.sleep(0.01)
        check_error(await w.ask(POISON), 502)
        gate.set()
        broken = [answer for task in beside if b'"error"' in (answer := await task).content]
        assert broken
        check_error(await w.ask(POISON), 422, "request_quarantined")
        again = [(await w.ask(text, stream=True)).status_code for text in honest]
        assert again == [200] * len(honest)
        assert hit(w) == 2


async def test_honest_requests_on_engines_that_end_one_after_the_other_are_served(
    world: MakeWorld,
) -> None:
    first, second, third = MockUpstream(mode="hang"), MockUpstream(mode="hang"), MockUpstream()
    third.health = 503
    routing = {"first_byte_timeout_s": 60, "answer_timeout_s": 60}
    async with world([first, second, third], routing=routing) as w:
        texts = [f"question {number}" for number in range(12)]
        asking = [asyncio.create_task(w.ask(text)) for text in texts]
        for engine, running in ((first, len(texts) // 2), (second, len(texts))):
            async with asyncio.timeout(15):
                while engine.running < running:
                    await asyncio.sleep(0.01)
            await engine.stop()
        assert {(await task).status_code for task in asking} == {502}
        third.health = 200
        await until_ready(w)
        answers = [await w.ask(text) for text in texts]
        for answer in answers:  # those that both broke do not risk the last one
            if answer.status_code != 200:
                check_error(answer, 503, "overloaded")
        assert sum(answer.status_code == 200 for answer in answers) == len(texts) // 2
        await second.start()
        second.mode = "ok"
        while sum(one.is_available for one in w.gateway.upstreams.all) < 2:
            await asyncio.sleep(0.05)
        assert [(await w.ask(text)).status_code for text in texts] == [200] * len(texts)


async def test_a_poisoned_request_that_comes_again_does_not_end_the_last_engine(
    world: MakeWorld,
) -> None:
    engines = poisoned(3, "die")
    async with world(engines, routing={**SLOW_CHECKS, "answer_timeout_s": 60}) as w:
        for engine in engines:
            engine.mode = "hang"
        beside = [asyncio.create_task(w.ask(f"question {number}")) for number in range(9)]
        while sum(engine.running for engine in engines) < len(beside):
            await asyncio.sleep(0.01)
        check_error(await w.ask(POISON), 502)
        for _ in range(5):
            assert (await w.ask(POISON)).status_code in (422, 503)
        assert hit(w) == 2
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)


async def test_concurrent_copies_crash_no_more_engines_than_they_reach(world: MakeWorld) -> None:
    async with world(poisoned(6, "die"), routing=SLOW_CHECKS) as w:
        answers = await asyncio.gather(*(w.ask(POISON) for _ in range(3)))
        assert {answer.status_code for answer in answers} <= {502, 422}
        assert hit(w) <= 4
        check_error(await w.ask(POISON), 422, "request_quarantined")
        assert (await w.ask()).status_code == 200


async def test_requests_on_engines_that_are_taken_away_are_no_suspects(world: MakeWorld) -> None:
    engines = [MockUpstream(mode="hang") for _ in range(2)]
    async with world(engines, routing={**SLOW_CHECKS, "first_byte_timeout_s": 30}) as w:
        asking = asyncio.create_task(w.ask(stream=True))
        for _ in engines:
            while not (running := [one for one in engines if one.running]):
                await asyncio.sleep(0.01)
            (upstream,) = (one for one in w.gateway.upstreams.all if one.active)
            upstream.is_retired = True
            await running[0].stop()
        check_error(await asking, 502)
        assert not counted(w, "quarantined_total")


async def until_ready(w: World, *, ready: bool = True) -> None:
    async with asyncio.timeout(15):
        while ((await w.client.get("/ready")).status_code == 200) != ready:
            await asyncio.sleep(0.05)


async def test_content_is_recognized_whoever_sends_it(world: MakeWorld) -> None:
    found: list[bytes] = []
    content = part("image_url", data_url(make_image()))
    other = [{"type": "text", "text": "y"}, *content]
    async with world(keys=[{"name": "a"}, {"name": "b", "priority": 3}]) as w:
        relayed = w.gateway.relay.answer

        async def noted(job: UpstreamRequest, *rest: Any) -> None:
            found.append(job.content)
            await relayed(job, *rest)

        w.gateway.relay.answer = noted  # type: ignore[assignment,method-assign]
        for key, asked in (("a", content), ("a", content), ("b", content), ("b", other)):
            assert (await w.ask(asked, headers=bearer(key))).status_code == 200
    first, same, of_another, different = found
    assert first == same == of_another
    assert different != first


# -- without a gateway around it -----------------------------------------------------------------


def quarantine(seconds: float = 300) -> Quarantine:
    return Quarantine(seconds, Metrics())


def refused(given: Quarantine, content: bytes) -> str | None:
    """The code that a request is refused with."""
    try:
        with given.admit(content):
            return None
    except ApiError as error:
        return error.code


def test_one_crash_does_not_quarantine_a_request() -> None:
    given = quarantine()
    for _ in range(2):  # two of the same content, in flight at the same time
        given.record_crash(b"a", 1)
    with given.admit(b"a") as on_trial:
        assert not on_trial


def test_requests_that_share_both_crashes_are_tried_one_at_a_time() -> None:
    given = quarantine()
    for content in (b"a", b"b"):
        given.record_crash(content, 1)
        given.record_crash(content, 2)
    with given.admit(b"a") as on_trial:
        assert on_trial
        assert refused(given, b"b") == "overloaded"
    given.answered(b"a")
    with given.admit(b"a") as on_trial:
        assert not on_trial
    with given.admit(b"b") as on_trial:  # perhaps neither was the cause
        assert on_trial


def test_a_fraction_of_many_requests_that_share_both_crashes_is_tried_at_a_time() -> None:
    given = quarantine()
    contents = [bytes([number]) for number in range(40)]
    for content in contents:
        given.record_crash(content, 1)
        given.record_crash(content, 2)
    held = [given.admit(content) for content in contents[:10]]
    assert all(one.__enter__() for one in held)
    assert refused(given, contents[10]) == "overloaded"
    for one in held:
        one.__exit__(None, None, None)
    assert refused(given, contents[10]) is None


def test_a_third_crash_identifies_the_cause() -> None:
    given = quarantine()
    for content in (b"a", b"poison"):
        given.record_crash(content, 1)
        given.record_crash(content, 2)
    given.record_crash(b"poison", 3)
    assert refused(given, b"poison") == "request_quarantined"
    assert refused(given, b"a") is None


def test_content_that_succeeded_before_is_refused_only_after_a_third_crash() -> None:
    given = quarantine()
    given.answered(b"a")
    for number in (1, 2):
        given.record_crash(b"a", number)
    with given.admit(b"a") as on_trial:
        assert on_trial
    given.record_crash(b"a", 3)
    assert refused(given, b"a") == "request_quarantined"


def test_a_success_clears_earlier_crashes() -> None:
    given = quarantine()
    given.record_crash(b"a", 1)
    given.answered(b"a")
    given.record_crash(b"a", 2)
    assert given.check(b"a") is False


def test_a_quarantine_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    given = quarantine(60)
    given.record_crash(b"a", 1)
    given.record_crash(b"a", 2)
    assert refused(given, b"a") == "request_quarantined"
    later = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert refused(given, b"a") is None
    assert not given._records
    assert not given._crashes


def test_the_number_of_records_is_bounded() -> None:
    given = quarantine()
    for number in range(2 * MAX_ENTRIES):
        given.answered(number.to_bytes(4))
    assert len(given._answered) == MAX_ENTRIES
    for number in range(2 * MAX_ENTRIES):
        given.record_crash(number.to_bytes(4), number)
    assert len(given._records) == len(given._crashes) == MAX_ENTRIES
