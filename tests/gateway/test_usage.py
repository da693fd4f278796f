"""Tokens are counted for every stream, and clients see what they would see without that."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_serve.gateway.upstream.sse import Events
from tests.gateway.conftest import MakeWorld, World
from tests.gateway.mock_upstream import MODEL

HEAD = b'data: {"id":"1","model":"m","choices":['
TOKEN = HEAD + b'{"index":0,"delta":{"content":"say \\"usage\\":{"},"finish_reason":null}]}\n\n'
END = HEAD + b'{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
STAMPED = END.replace(b"]}\n\n", b'],"system_fingerprint":"vllm-1\xc3\xa9"}\n\n')
USAGE = HEAD + b'],"usage":{"completion_tokens":2},"system_fingerprint":"vllm-1\xc3\xa9"}\n\n'
DONE = b"data: [DONE]\n\n"


def through(pieces: list[bytes]) -> tuple[bytes, Events]:
    events = Events(hide_usage=True)
    return b"".join(events.feed(piece) for piece in pieces), events


@given(st.lists(st.integers(0, len(TOKEN * 2 + END + USAGE + DONE)), max_size=8))
def test_a_stream_is_the_same_wherever_it_is_cut(cuts: list[int]) -> None:
    sent = TOKEN * 2 + END + USAGE + DONE
    places = [0, *sorted(cuts), len(sent)]
    pieces = [sent[a:b] for a, b in itertools.pairwise(places)]
    seen, events = through([piece for piece in pieces if piece])
    assert seen == TOKEN * 2 + STAMPED + DONE
    assert events.done
    assert events.last_usage == USAGE.removeprefix(b"data: ").removesuffix(b"\n\n")


@pytest.mark.parametrize(
    "sent",
    [
        TOKEN + END + DONE,  # an engine that does not tell
        TOKEN + STAMPED + DONE,
        TOKEN + DONE,
        TOKEN.replace(b"null}]", b'null}],"usage":null') + END + DONE,
        b'data: {"usage" is not json\n\n' + DONE,
    ],
)
def test_what_is_no_usage_is_passed_on(sent: bytes) -> None:
    events = [event + b"\n\n" for event in sent.split(b"\n\n")[:-1]]
    assert through(events)[0] == through([sent])[0] == sent


def test_nothing_waits_but_the_event_before_the_usage() -> None:
    events = Events(hide_usage=True)
    assert events.feed(TOKEN) == TOKEN
    assert events.feed(END) == b""
    assert events.feed(USAGE) == STAMPED
    assert events.feed(DONE) == DONE


def test_an_engine_with_other_spaces_hides_its_usage_too() -> None:
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 2}}\n\n'
    assert through([TOKEN, usage, DONE])[0] == TOKEN + DONE


async def streamed(w: World, **fields: Any) -> bytes:
    async with w.stream(**fields) as response:
        return await response.aread()


def counted(w: World) -> float | None:
    name = "ep_serve_gateway_completion_tokens_total"
    return w.gateway.metrics.registry.get_sample_value(name)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stream_options": None},
        {"stream_options": {}},
        {"stream_options": {"include_usage": False}},
        {"stream_options": {"include_usage": False, "continuous_usage_stats": True}},
        {"stream_options": {"include_usage": True}},
        {"n": 1},
    ],
)
async def test_streams_are_counted_and_are_the_engines_own_byte_for_byte(
    world: MakeWorld, options: dict[str, Any]
) -> None:
    async with world() as w:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "stream": True}
        url = f"{w.engine.url}/v1/chat/completions"
        direct = await w.client.post(url, json={**body, **options})
        assert await streamed(w, **options) == direct.content
        assert counted(w) == 5
        asked = w.engine.requests[-1]["stream_options"]
        assert asked["include_usage"] is True
        assert not asked.get("continuous_usage_stats")


@pytest.mark.anyio
@pytest.mark.parametrize("options", [{"n": 2}, {"stream_options": "nonsense"}, {"stream": False}])
async def test_other_requests_are_left_as_they_are(
    world: MakeWorld, options: dict[str, Any]
) -> None:
    async with world() as w:
        w.engine.mode = "refuse"
        await w.ask(**{"stream": True, **options})
        assert w.engine.requests[-1].get("stream_options") == options.get("stream_options")
