"""The official client gets from the gateway what it gets from the engine: the real ones, together.

Ids and times of creation differ between two answers of one engine, and nothing else may. An engine
puts two tokens into one chunk when it is behind, so streams are compared chunk by chunk until both
were sent in the same pieces, and put together each time.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.clips import make_clip, make_image, make_wav
from tests.engine.client import audio, image, part, text, user, video
from tests.gateway.comparison import bare, joined, same
from tests.gateway.node import MODEL, TENANTS, Node, node

pytestmark = pytest.mark.engine

CLIP = make_clip(2, seed=51)
WAV = make_wav(1)
FILE_ID = "the id of the uploaded clip"
URL = "the URL of the clip"
TRIES = 10

FUNCTION = {"name": "report", "parameters": {"type": "object", "properties": {}}}
SPOKEN = {"data": audio(WAV)["audio_url"]["url"].partition(",")[2], "format": "wav"}

CASES: dict[str, dict[str, Any]] = {
    "text": {"messages": user(text("Hello"))},
    "a clip inline": {"messages": user(video(CLIP), text("What is it?"))},
    "a clip by file_id": {
        "messages": user({"type": "file", "file": {"file_id": FILE_ID}}, text("What is it?"))
    },
    "a clip by URL": {"messages": user(part("video", URL), text("What is it?"))},
    "a picture": {"messages": user(image(make_image()), text("What is it?"))},
    "sound": {"messages": user(audio(WAV), text("What is it?"))},
    "sound inline": {
        "messages": user({"type": "input_audio", "input_audio": SPOKEN}, text("What is it?"))
    },
    "several turns": {
        "messages": [
            {"role": "system", "content": "You are brief."},
            *user(video(CLIP), text("What is seen?")),
            {"role": "assistant", "content": "A pattern."},
            *user(audio(WAV), image(make_image()), text("And now?")),
        ]
    },
    "fields of ours": {
        "messages": user(video(CLIP), text("What is it?")),
        "extra_body": {"keep_ratio": 0.5, "fps": 1.0, "use_audio_in_video": False},
    },
    "usage in every chunk": {
        "messages": user(video(CLIP), text("What is it?")),
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "extra_body": {"keep_ratio": 0.1},
    },
    "logprobs": {"messages": user(text("Hello")), "logprobs": True, "top_logprobs": 3},
    "several choices": {"messages": user(text("Hello")), "n": 3, "seed": 7, "temperature": 1.0},
    "a seed": {"messages": user(video(CLIP)), "seed": 11, "temperature": 0.8, "top_p": 0.9},
    "a tool": {
        "messages": user(text("Report.")),
        "max_tokens": 160,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": {"type": "function", "function": {"name": "report"}},
    },
    "token ids": {"messages": user(text("Hello")), "extra_body": {"return_token_ids": True}},
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder: Path = tmp_path_factory.mktemp("contract")
    with node(folder) as started:
        (started.web / "clip.mp4").write_bytes(CLIP)
        yield started


@pytest.fixture(scope="module")
def client(here: Node) -> Iterator[openai.OpenAI]:
    with here.through() as made:
        yield made


@pytest.fixture(scope="module")
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=("clip.mp4", CLIP), purpose="vision").id


@pytest.fixture(params=CASES)
def asked(
    request: pytest.FixtureRequest, here: Node, file_id: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `create`, for the engine and for the gateway."""
    case = {"model": MODEL, "max_tokens": 8, "temperature": 0, **CASES[request.param]}
    url = f"{here.web_url}/clip.mp4"
    inline = {FILE_ID: video(CLIP), URL: part("video", url)}
    named = {FILE_ID: {"type": "file", "file": {"file_id": file_id}}, URL: inline[URL]}
    return _filled(case, inline), _filled(case, named)


def _filled(case: dict[str, Any], media: dict[str, Any]) -> dict[str, Any]:
    """A case whose clips are there."""

    def filled(content: Any) -> Any:
        names = [
            value
            for inner in content.values()
            if isinstance(inner, dict)
            for value in inner.values()
        ]
        return next((media[name] for name in names if name in media), content)

    messages = [
        {**m, "content": [filled(p) for p in m["content"]]} if isinstance(m["content"], list) else m
        for m in case["messages"]
    ]
    return {**case, "messages": messages}


Asked = tuple[dict[str, Any], dict[str, Any]]


def test_answers_are_the_engines_own(here: Node, client: openai.OpenAI, asked: Asked) -> None:
    direct, through = ({k: v for k, v in a.items() if k != "stream_options"} for a in asked)

    async def from_async() -> Any:
        async with openai.AsyncOpenAI(**here.options()) as other:
            return await other.chat.completions.create(**through)

    expected = bare(here.direct.chat.completions.create(**direct))
    assert same(bare(client.chat.completions.create(**through)), expected)
    assert same(bare(asyncio.run(from_async())), expected)


def test_streams_are_the_engines_own_chunk_by_chunk(
    here: Node, client: openai.OpenAI, asked: Asked
) -> None:
    direct, through = ({"stream": True, **arguments} for arguments in asked)

    async def from_async() -> list[Any]:
        async with openai.AsyncOpenAI(**here.options()) as other:
            return [chunk async for chunk in await other.chat.completions.create(**through)]

    def expected() -> list[Any]:
        return list(here.direct.chat.completions.create(**direct))

    agree(lambda: list(client.chat.completions.create(**through)), expected)
    agree(lambda: asyncio.run(from_async()), expected)


def agree(through: Callable[[], list[Any]], direct: Callable[[], list[Any]]) -> None:
    for _ in range(TRIES):
        chunks = [[bare(chunk) for chunk in stream()] for stream in (through, direct)]
        assert len(chunks[0]) > 1
        assert same(*(joined(found) for found in chunks))
        if same(*chunks):
            return
    raise AssertionError(f"never in the same pieces: {chunks}")


def test_usage_tells_what_was_kept(client: openai.OpenAI) -> None:
    messages = user(video(CLIP), text("What is it?"))
    answer = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=2, extra_body={"keep_ratio": 0.1}
    )
    assert answer.usage is not None
    reduction = answer.usage.model_dump()["reduction"]
    assert reduction["keep_ratio"] == 0.1
    assert 0 < reduction["av_tokens_kept"] < reduction["av_tokens_full"] / 5
    assert reduction["audio"]["full"] > 0


def test_a_stop_word_ends_both_alike(here: Node, client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "messages": user(text("Hello")),
        "max_tokens": 16,
        "temperature": 0,
    }
    whole = here.direct.chat.completions.create(**arguments).choices[0].message.content or ""
    arguments["stop"] = [whole[4:6]]
    answers = [c.chat.completions.create(**arguments) for c in (here.direct, client)]
    assert same(bare(answers[0]), bare(answers[1]))
    assert answers[1].choices[0].finish_reason == "stop"


REFUSED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 7},
    "max_tokens": {"max_tokens": 100_000},
    "fps": {"extra_body": {"fps": 10}},  # what the gateway lets pass, and this engine does not
    "top_logprobs": {"logprobs": True, "top_logprobs": 10_000},
    "a prompt that is too long": {"messages": user(text("Hello " * 4_000))},
    "tools": {"tools": [{"type": "function", "function": {}}]},
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_of_the_engine_arrive_as_the_clients_errors(
    here: Node, client: openai.OpenAI, name: str, stream: bool
) -> None:
    arguments: dict[str, Any] = {
        "model": MODEL,
        "messages": user(video(CLIP), text("What is it?")),
        "max_tokens": 2,
        **REFUSED[name],
    }
    with pytest.raises(openai.APIStatusError) as caught:
        here.direct.chat.completions.create(**arguments)
    direct = caught.value
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(stream=stream, **arguments)
    through = caught.value
    assert type(through) is type(direct) is openai.BadRequestError
    assert isinstance(through.body, dict)
    assert set(through.body) == {"message", "type", "param", "code"}
    assert through.type == "invalid_request_error"
    assert isinstance(direct.body, dict)
    assert through.body["message"] == direct.body["message"]
    assert through.param == direct.param


def test_what_the_gateway_refuses_is_the_clients_error_too(client: openai.OpenAI) -> None:
    ask = client.chat.completions.create
    with pytest.raises(openai.BadRequestError) as ratio:
        ask(model=MODEL, messages=user(text("Hello")), extra_body={"keep_ratio": 2})
    assert ratio.value.param == "keep_ratio"
    with pytest.raises(openai.NotFoundError) as model:
        ask(model="other", messages=user(text("Hello")))
    assert model.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as broken:
        ask(model=MODEL, messages=user(video(CLIP[:200])))
    assert broken.value.status_code in (400, 415)


def test_the_models_are_the_engines(here: Node, client: openai.OpenAI) -> None:
    (direct,), (through,) = (list(asked.models.list()) for asked in (here.direct, client))
    assert (through.id, through.owned_by) == (direct.id, direct.owned_by)


def test_nothing_is_decoded_for_a_second_question(here: Node, client: openai.OpenAI) -> None:
    data = make_clip(2, seed=52)
    (here.web / "second.mp4").write_bytes(data)
    made = client.files.create(file=("clip.mp4", data), purpose="vision")
    named = {"type": "file", "file": {"file_id": made.id}}
    remote = part("video", f"{here.web_url}/second.mp4")

    def ask(medium: dict[str, Any], words: str) -> None:
        client.chat.completions.create(
            model=MODEL, messages=user(medium, text(words)), max_tokens=2
        )

    def work() -> list[float]:
        names = ("ep_serve_media_decodes_total", "ep_serve_tower_cache_misses_total")
        return [here.metric(name) for name in names]

    before = work()
    ask(named, "What is it?")
    after = work()
    assert all(late > early for late, early in zip(after, before, strict=True))
    for number, medium in enumerate((named, video(data), remote)):
        ask(medium, f"And what is heard at {number}?")
    assert work() == after


def test_tenants_share_neither_ids_nor_answers_in_a_cache(here: Node) -> None:
    data = make_clip(3, seed=53)
    messages = user(video(data), text("What is it? " * 10))
    digest = hashlib.sha256(data).hexdigest()

    def reused(tenant: str) -> float:
        before = here.metric("vllm:prefix_cache_hits_total")
        with here.through(tenant) as asked:
            asked.chat.completions.create(model=MODEL, messages=messages, max_tokens=2)
        return here.metric("vllm:prefix_cache_hits_total") - before

    def knows(tenant: str) -> bool:
        """Whether the engine remembers the clip under the id that this tenant has for it."""
        name = hashlib.sha256(f"ep-serve|{tenant}|video|{digest}".encode()).hexdigest()
        only_id = {"type": "video_url", "video_url": None, "uuid": name}
        salt = hashlib.sha256(f"ep-serve|{tenant}".encode()).hexdigest()
        body = {"model": MODEL, "messages": user(only_id), "max_tokens": 1, "cache_salt": salt}
        answer = httpx.post(f"{here.engine}/v1/chat/completions", json=body, timeout=60)
        assert answer.status_code in (200, 400)
        return answer.status_code == 200

    anna, ben = TENANTS
    assert reused(anna) == 0
    assert knows(anna)
    assert not knows(ben)
    assert reused(ben) == 0
    assert knows(ben)
    assert reused(anna) > 0


def test_a_client_that_goes_away_cancels_the_engine_within_a_second(
    here: Node, client: openai.OpenAI
) -> None:
    tokens = 1_500

    def seconds() -> float | None:
        """None where the story was told before anybody went away, as on a very busy machine."""
        before = here.metric("vllm:generation_tokens_total")
        stream = client.chat.completions.create(**long_story(tokens))
        next(stream)
        seen = becomes(here, 1, within=5)
        stream.close()
        left = time.monotonic()
        assert becomes(here, 0, within=60)
        took = time.monotonic() - left
        told = here.metric("vllm:generation_tokens_total") - before
        return took if seen and told < tokens else None

    rounds = (seconds() for _ in range(10))
    assert any(took is not None and took < 1 for took in rounds)


def test_sigterm_lets_a_running_stream_finish(here: Node, client: openai.OpenAI) -> None:
    """The last test of this module: nothing runs after it."""
    stream = client.chat.completions.create(**long_story(900))
    chunks = [next(stream)]
    here.terminate()
    while takes_more(here):
        time.sleep(0.05)
    chunks += stream
    assert chunks[-1].choices[0].finish_reason == "length"
    assert here.process.wait() == 0


def takes_more(here: Node) -> bool:
    try:
        return httpx.get(f"{here.gateway}/ready").status_code == 200
    except httpx.ConnectError:  # a busy machine may miss the time in which it says no
        return False


def long_story(tokens: int) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": user(text("Hello")),
        "max_tokens": tokens,
        "stream": True,
        "extra_body": {"ignore_eos": True},
    }


def becomes(here: Node, running: int, within: float) -> bool:
    """Whether the engine runs so many requests soon."""
    deadline = time.monotonic() + within
    while here.metric("vllm:num_requests_running") != running:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
