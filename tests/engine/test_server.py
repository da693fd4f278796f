"""The server over HTTP, as its clients see it."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from ep_serve.engine import metrics, outcomes
from ep_serve.gateway.upstream.connection import KEEPALIVE_S
from tests.clips import make_clip
from tests.engine.client import (
    MODEL,
    Client,
    audio,
    golden_messages,
    image,
    part,
    text,
    user,
    video,
)
from tests.goldens import CASES, CLIPS, load_case

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]

DEFAULT_RATE = [name for name in CASES if "fps" not in name]


def golden_body(name: str) -> dict[str, Any]:
    return {"keep_ratio": load_case(name)[0]["compression_ratio"]}


@pytest.mark.parametrize("name", DEFAULT_RATE)
def test_the_answer_is_that_of_the_authors_code(server: Client, name: str) -> None:
    case, _ = load_case(name)
    answer = server.ask(golden_messages(name), **golden_body(name))
    assert answer.token_ids == case["stats"]["generated_ids"]


def test_idle_connections_outlive_the_time_that_gateways_keep_them(server: Client) -> None:
    url = httpx.URL(server.root)
    with socket.create_connection((url.host, url.port or 80), timeout=30) as sock:
        for pause in (0, 2 * KEEPALIVE_S + 1):
            time.sleep(pause)
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: engine\r\n\r\n")
            assert sock.recv(1 << 12).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("name", [n for n in DEFAULT_RATE if n != "text_only"])
def test_usage_tells_what_was_kept(server: Client, name: str) -> None:
    case, _ = load_case(name)
    stats = case["stats"]
    answer = server.ask(golden_messages(name), **golden_body(name))
    assert answer.prompt_tokens == stats["L_compressed"]
    assert answer.reduction == {
        "keep_ratio": case["compression_ratio"],
        "prompt_tokens_full": stats["L"],
        "prompt_tokens_reduced": stats["L_compressed"],
        "av_tokens_full": stats["n_av"],
        "av_tokens_kept": stats["k"],
        "video": {"full": stats["n_video"], "kept": stats["kept_video"]},
        "audio": {"full": stats["n_audio"], "kept": stats["kept_audio"]},
        "image": {"full": stats["n_image"], "kept": stats["kept_image"]},
    }


def test_the_selection_is_reported_when_requested(server: Client) -> None:
    name = "aiv_a_r020"
    stats = load_case(name)[0]["stats"]
    for _ in range(2):  # also when the engine remembers the item
        answer = server.ask(golden_messages(name), **golden_body(name), return_selection=True)
        media = answer.reduction.pop("selection")
        video = [m["video"] for m in media if m["type"] == "video"]
        audio = [m["audio"] for m in media if "audio" in m]
        assert sum(len(m["kept"]) for m in video) == stats["kept_video"]
        assert sum(len(m["kept"]) for m in audio) == stats["kept_audio"]
        assert sum(math.prod(m["grid"]) for m in video) == stats["n_video"]
        assert [len(m["scores"]) for m in audio] == [m["tokens"] for m in audio]
        for medium in (*video, *audio):
            dropped = set(range(len(medium["scores"]))) - set(medium["kept"])
            if medium["kept"] and dropped:
                worst = min(medium["scores"][i] for i in medium["kept"])
                assert worst >= max(medium["scores"][i] for i in dropped)
    assert answer.reduction == server.ask(golden_messages(name), **golden_body(name)).reduction


def test_plain_text_has_no_reduction(server: Client) -> None:
    assert server.ask(golden_messages("text_only")).reduction is None


def test_the_last_chunk_of_a_stream_tells_what_was_kept(server: Client) -> None:
    whole = server.ask(golden_messages("aiv_a_r020"))
    stream = server.openai.chat.completions.create(
        model=MODEL,
        messages=golden_messages("aiv_a_r020"),
        max_tokens=8,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.text
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.model_dump()["reduction"] == whole.reduction


def test_24_requests_at_once_are_answered_as_one_by_one(server: Client) -> None:
    names = [DEFAULT_RATE[i % len(DEFAULT_RATE)] for i in range(24)]

    def ask(name: str) -> list[int]:
        return server.ask(golden_messages(name), **golden_body(name)).token_ids

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, names))
    assert answers == [load_case(name)[0]["stats"]["generated_ids"] for name in names]


def test_a_second_question_runs_no_tower_and_decodes_nothing(server: Client) -> None:
    clip = video(make_clip(3, seed=41))
    server.ask(user(clip, text("What is it?")))
    misses = server.metric("ep_serve_tower_cache_misses_total")
    hits = server.metric("ep_serve_tower_cache_hits_total")
    decodes = server.metric("ep_serve_media_decodes_total")
    second = server.ask(user(clip, text("And what is heard in it?")))
    assert second.reduction is not None
    assert server.metric("ep_serve_tower_cache_misses_total") == misses
    assert server.metric("ep_serve_tower_cache_hits_total") == hits + 2  # picture and sound
    assert server.metric("ep_serve_media_decodes_total") == decodes


def test_an_identical_request_comes_from_the_prefix_cache(server: Client) -> None:
    messages = user(video(make_clip(4, seed=42)), text("What is it?" * 8))
    first = server.ask(messages)
    again = server.ask(messages)
    assert first.cached_tokens == 0
    assert again.cached_tokens == (again.prompt_tokens - 1) // 32 * 32 > 0
    assert again.token_ids == first.token_ids
    assert again.reduction == first.reduction


def test_another_keep_ratio_is_another_prompt(server: Client) -> None:
    messages = user(video(make_clip(4, seed=43)), text("What is it?"))
    kept = [server.ask(messages, keep_ratio=r).prompt_tokens for r in (0.5, 0.1, 0.5)]
    assert kept[0] == kept[2] > kept[1]


def test_frame_rate_and_pixels_can_be_asked_for(server: Client) -> None:
    messages = user(video(make_clip(4, size=(224, 224), seed=44)), text("What is it?"))
    full = [
        server.ask(messages, **body).reduction["video"]["full"]
        for body in ({}, {"fps": 1.0}, {"max_pixels": 112 * 112})
    ]
    assert full == [4 * 64, 2 * 64, 4 * 16]


def test_sound_can_be_left_out(server: Client) -> None:
    messages = user(video((CLIPS / "a.mp4").read_bytes()), text("What is it?"))
    full = [
        server.ask(messages, **body).reduction["audio"]["full"]
        for body in ({}, {"use_audio_in_video": True}, {"use_audio_in_video": False})
    ]
    assert full == [102, 102, 0]


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    """A web server on the loopback interface that has the goldens' clips."""
    handler = partial(_Quiet, directory=str(CLIPS))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def test_media_are_fetched_from_urls(server: Client, web: str) -> None:
    messages = user(part("video", f"{web}/a.mp4"), text("Describe the video"))
    system = {"role": "system", "content": "You are a helpful assistant."}
    answer = server.ask([system, *messages])
    assert answer.token_ids == load_case("aiv_a_r020")[0]["stats"]["generated_ids"]


def test_sound_and_pictures_come_in_every_form(server: Client) -> None:
    wav, png = (CLIPS / "d.wav").read_bytes(), (CLIPS / "e.png").read_bytes()
    spoken = audio(wav)
    url = spoken["audio_url"]["url"]
    inline = {
        "type": "input_audio",
        "input_audio": {"data": url.partition(",")[2], "format": "wav"},
    }
    answers = [server.ask(user(s, image(png), text("And?"))).token_ids for s in (spoken, inline)]
    assert answers[0] == answers[1]


def test_media_may_come_in_several_turns(server: Client) -> None:
    clip, wav = (CLIPS / "c.mp4").read_bytes(), (CLIPS / "d.wav").read_bytes()
    messages = [
        *user(video(clip), text("What is seen?")),
        {"role": "assistant", "content": "A pattern."},
        *user(audio(wav), text("What is heard?")),
    ]
    reduction = server.ask(messages).reduction
    assert reduction is not None
    assert (reduction["video"]["full"], reduction["audio"]["full"]) == (36, 62)


def test_several_choices_with_logprobs(server: Client) -> None:
    completion = server.openai.chat.completions.create(
        model=MODEL,
        messages=golden_messages("aiv_a_r020"),
        n=3,
        max_tokens=4,
        temperature=1,
        seed=1,
        logprobs=True,
        top_logprobs=2,
    )
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    for choice in completion.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_an_answer_can_be_bound_to_a_schema(server: Client) -> None:
    schema = {
        "type": "object",
        "properties": {"sound": {"type": "boolean"}},
        "required": ["sound"],
        "additionalProperties": False,
    }
    completion = server.openai.chat.completions.create(
        model=MODEL,
        messages=golden_messages("aiv_a_r020"),
        max_tokens=64,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "heard", "schema": schema, "strict": True},
        },
    )
    answer = json.loads(completion.choices[0].message.content or "")
    assert isinstance(answer["sound"], bool)


def test_a_tool_can_be_called(server: Client) -> None:
    function = {"name": "report", "parameters": {"type": "object", "properties": {}}}
    response = server.post(
        {
            "messages": golden_messages("aiv_a_r020"),
            "max_tokens": 160,
            "temperature": 0,
            "tools": [{"type": "function", "function": function}],
            "tool_choice": {"type": "function", "function": {"name": "report"}},
        },
        timeout=120,
    )
    (call,) = response.json()["choices"][0]["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"]["name"] == "report"


def test_a_client_that_goes_away_frees_its_request(server: Client) -> None:
    body = {
        "model": MODEL,
        "messages": golden_messages("aiv_a_r020"),
        "max_tokens": 1900,
        "ignore_eos": True,
        "stream": True,
    }
    with httpx.stream("POST", f"{server.root}/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()  # a generator that nobody holds would close the stream
        next(lines)
        assert becomes(server, "vllm:num_requests_running", 1)
    assert becomes(server, "vllm:num_requests_running", 0)


def becomes(server: Client, name: str, value: float) -> bool:
    """Whether a metric has the value within 5 s."""
    deadline = time.monotonic() + 5
    while server.metric(name) != value and time.monotonic() < deadline:
        time.sleep(0.1)
    return server.metric(name) == value


def test_every_documented_series_is_exported(server: Client) -> None:
    server.ask(golden_messages("aiv_a_r020"))
    for modality in ("video", "audio", "image"):
        full = server.metric("ep_serve_av_tokens_full_total", modality=modality)
        assert full >= server.metric("ep_serve_av_tokens_kept_total", modality=modality)
    for stage in (*metrics.STAGES, *outcomes.WORKER_STAGES):
        assert server.metric("ep_serve_stage_seconds_total", stage=stage) > 0
    assert server.metric("ep_serve_event_loop_late_seconds_count") > 0
    assert server.metric("ep_serve_kv_tokens_saved_total") > 0
    assert server.metric("ep_serve_request_keep_ratio_count") > 0
    assert server.metric("ep_serve_tower_cache_bytes") > 0
    assert server.metric("ep_serve_media_cache_misses_total") > 0
    server.metric("ep_serve_media_cache_hits_total")
