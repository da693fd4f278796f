"""Bounds of requests on every route that generates: refused by name, and the server goes on."""

from __future__ import annotations

import json
import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import torch
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

from ep_serve.contract.errors import FieldError
from ep_serve.contract.media_tokens import MEDIA_TOKENS
from ep_serve.engine.input.media_tokens import count_media_tokens, refuse_media_tokens
from ep_serve.engine.server import request_limits
from ep_serve.engine.worker import grammar_guard
from ep_serve.engine.worker.grammar_guard import WatchedGrammar
from ep_serve.engine.worker.scheduler import ReducingScheduler
from ep_serve.layout import PlaceholderError
from tests.clips import make_clip, make_image
from tests.engine.client import MODEL, Client, image, text, user, video

HELLO = user(text("Hello"))
NOTHING_FOLLOWS = "a[^\\u0000-\\U0010ffff]"
"""A regular expression that leads nowhere after one letter, and that the bounds let through."""


class Tokenizer:
    def get_added_vocab(self) -> dict[str, int]:
        return {"<|im_end|>": 1, **{token: 10 + i for i, token in enumerate(MEDIA_TOKENS)}}


# -- without an engine --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-1e999", "1" * 400 + ".0", "1e+0999", str(2**64), str(-(2**70))]
)
def test_numbers_without_an_end_are_refused_by_the_name_of_their_field(number: str) -> None:
    body = f'{{"messages": [], "x": {{"y": [1, {number}]}}}}'.encode()
    with pytest.raises(FieldError, match=r"^x holds a number that is not finite") as caught:
        request_limits.check_body("/v1/chat/completions", body, 8)
    assert caught.value.field == "x"


@pytest.mark.parametrize(
    "body", [b"{", b"\xff", b'{"a": "\\ud800"}', b"[" * 5_000, b'{"a": 1' + b"0" * 5_000 + b"}"]
)
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(FieldError, match=r"^body is not JSON"):
        request_limits.check_body("/v1/chat/completions", body, 8)


@pytest.mark.parametrize(
    "body",
    [b"{}", b"5", b'{"a": 18446744073709551615}', b"[]", b'{"a": "1e999 NaN", "b": 1e308, "n": 8}'],
)
def test_other_bodies_are_let_through(body: bytes) -> None:
    request_limits.check_body("/v1/chat/completions", body, 8)


def test_sampling_parameters_of_token_requests_are_bounded_too() -> None:
    body = b'{"token_ids": [1], "sampling_params": {"n": 9}}'
    with pytest.raises(FieldError, match=r"^n must be at most 8"):
        request_limits.check_body("/inference/v1/generate", body, 8)
    with pytest.raises(FieldError, match=r"^features is not accepted"):
        request_limits.check_body("/inference/v1/generate", b'{"features": {}}', 8)


def test_constraints_that_vllm_makes_are_bounded_where_all_routes_meet() -> None:
    given = StructuredOutputsParams(json={"$ref": "#"})
    params = SamplingParams(structured_outputs=given)
    with pytest.raises(VLLMValidationError) as caught:
        request_limits._validate_structured_outputs(params, None, None, None)
    assert caught.value.parameter == "structured_outputs.json"


def test_rendered_prompts_without_media_have_no_media_tokens() -> None:
    for number, token in enumerate(MEDIA_TOKENS):
        prompt = {"type": "token", "prompt_token_ids": [1, 2, 10 + number]}
        with pytest.raises(VLLMValidationError) as caught:
            refuse_media_tokens([prompt], Tokenizer(), "prompt")
        assert token in str(caught.value)
    refuse_media_tokens([{"type": "token", "prompt_token_ids": [1, 2, 3]}], Tokenizer(), "prompt")
    refuse_media_tokens([{"type": "multimodal", "prompt_token_ids": [10]}], Tokenizer(), "prompt")


def test_rendered_prompts_with_media_have_those_of_their_media() -> None:
    of = Tokenizer().get_added_vocab()
    clip = [of["<|vision_bos|>"], of["<|VIDEO|>"], of["<|vision_eos|>"]]
    count_media_tokens([5, *clip, 6], {"video": 1}, Tokenizer())
    count_media_tokens([5, of["<|VIDEO|>"]], {"video": 1}, Tokenizer())  # no template, no markers
    for wrong in (
        [*clip, *clip],
        [*clip, clip[0]],
        [*clip, of["<|AUDIO|>"]],
        [5],
        [
            *clip,
            of["<|vision_pad|>"],
        ],
    ):
        with pytest.raises(PlaceholderError):
            count_media_tokens(wrong, {"video": 1}, Tokenizer())


class Grammar:
    """Allows nothing after some tokens, and takes some time."""

    def __init__(self, tokens: int, seconds: float = 0) -> None:
        self.tokens = tokens
        self.seconds = seconds

    def fill_bitmask(self, bitmask: torch.Tensor, index: int) -> None:
        until = time.thread_time() + self.seconds
        while time.thread_time() < until:
            pass
        bitmask[index] = int(self.tokens > 0)

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        self.tokens -= len(tokens)
        return self.tokens >= 0


def test_a_grammar_that_leads_nowhere_ends_its_request() -> None:
    grammar = WatchedGrammar(cast("StructuredOutputGrammar", Grammar(1)))
    bitmask = torch.zeros(2, 3, dtype=torch.int32)
    grammar.fill_bitmask(bitmask, 0)
    assert bitmask.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert grammar.accept_tokens("r", [7])
    grammar.fill_bitmask(bitmask, 1)
    assert bitmask[1].tolist() == [-1, -1, -1]
    assert not grammar.accept_tokens("r", [7])
    assert grammar.failure == "allows nothing after 1 tokens of the answer"


def test_a_grammar_that_takes_too_long_ends_its_request() -> None:
    seconds = 1.2 * grammar_guard.MAX_SECONDS
    grammar = WatchedGrammar(cast("StructuredOutputGrammar", Grammar(5, seconds)))
    grammar.fill_bitmask(torch.zeros(1, 3, dtype=torch.int32), 0)
    assert not grammar.accept_tokens("r", [7])
    assert "for one token after 0 tokens" in str(grammar.failure)


def test_a_grammar_that_nobody_waits_for_any_more_is_not_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting: Future[Any] = Future()
    ended = [
        SimpleNamespace(structured_output_request=SimpleNamespace(_grammar=waiting)),
        SimpleNamespace(structured_output_request=None),
    ]
    monkeypatch.setattr(Scheduler, "finish_requests", lambda self, *args: ended)
    scheduler = object.__new__(ReducingScheduler)
    assert scheduler.finish_requests(["r"], RequestStatus.FINISHED_ABORTED) == ended
    assert waiting.cancelled()


# -- at a server --------------------------------------------------------------------------------


REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {  # route, field, body
    "a schema": (
        "chat/completions",
        "structured_outputs.json",
        {"structured_outputs": {"json": {"$ref": "#"}}},
    ),
    "a grammar": (
        "chat/completions",
        "structured_outputs.grammar",
        {"structured_outputs": {"grammar": "root ::= root"}},
    ),
    "a format": (
        "chat/completions",
        "response_format.json_schema.schema",
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"minItems": 10**9}},
            }
        },
    ),
    "a tool": (
        "chat/completions",
        "tools[0].function.parameters",
        {
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}],
            "tool_choice": "required",
        },
    ),
    "answers": ("chat/completions", "n", {"n": 2_000}),
    "answers of a completion": ("completions", "n", {"prompt": "x", "n": 9}),
    "a schema of a completion": (
        "completions",
        "structured_outputs.regex",
        {"prompt": "x", "structured_outputs": {"regex": "([a-z]?){64}"}},
    ),
    "prompts": ("completions", "prompt", {"prompt": ["x"] * 1_000}),
    "a token in a completion": ("completions", "prompt", {"prompt": "a <|VIDEO|>"}),
    "a token in a streamed completion": (
        "completions",
        "prompt",
        {"prompt": "a <|VIDEO|>", "stream": True},
    ),
    "a token of a response": ("responses", "messages", {"input": "a <|VIDEO|>"}),
    "a token as a role": (
        "chat/completions",
        "messages",
        {"messages": [{"role": "<|VIDEO|>", "content": "x"}]},
    ),
    "a token in a refusal": (
        "chat/completions",
        "messages",
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "<|VID"},
                        {"type": "refusal", "refusal": "EO|>"},
                    ],
                }
            ]
        },
    ),
    "a token of another process": (
        "chat/completions",
        "messages",
        {"kv_transfer_params": {"prompt_token_ids": [509]}, "messages": HELLO},
    ),
    "conversations of a batch": (
        "chat/completions/batch",
        "messages",
        {"messages": [HELLO] * 200},
    ),
    "a text that is a picture too": (
        "chat/completions",
        "messages[0].content[1]",
        {"messages": user(text("x"), {**text("x"), "image": 1})},
    ),
    "a text with a clip that nobody would see": (
        "chat/completions",
        "messages[0].content[0]",
        {"messages": user({**text("x"), "video_url": {"url": "data:,"}})},
    ),
    "a clip that would be a picture": (
        "chat/completions",
        "messages[0].content[0]",
        {"messages": user({**image(b"x"), **video(b"x"), "uuid": "a"})},
    ),
    "an id that is a number": (
        "chat/completions",
        "uuid",
        {"messages": user({**image(make_image()), "uuid": 5})},
    ),
    "a long id": (
        "chat/completions",
        "uuid",
        {"messages": user({**image(make_image()), "uuid": "x" * 1_000})},
    ),
    "arguments of a tool call without an end": (
        "chat/completions",
        "messages",
        {
            "messages": [
                *HELLO,
                {
                    "role": "assistant",
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "f", "arguments": '{"a":' + "[" * 100_000},
                        }
                    ],
                },
            ]
        },
    ),
    "a schema of a batch": (
        "chat/completions/batch",
        "structured_outputs.json",
        {"messages": [HELLO], "structured_outputs": {"json": {"$ref": "#"}}},
    ),
}


def healthy(server: Client) -> bool:
    return httpx.get(f"{server.root}/health", timeout=10).status_code == 200


def post(server: Client, route: str, body: dict[str, Any]) -> httpx.Response:
    body = {"model": MODEL, "max_tokens": 4, **body}
    if route == "chat/completions" and "messages" not in body:
        body["messages"] = HELLO
    return httpx.post(f"{server.root}/v1/{route}", json=body, timeout=60)


@pytest.mark.engine
@pytest.mark.xdist_group("server")
@pytest.mark.parametrize(("route", "field", "body"), REFUSED.values(), ids=REFUSED.keys())
def test_a_request_out_of_bounds_is_refused_by_name(
    server: Client, route: str, field: str, body: dict[str, Any]
) -> None:
    response = post(server, route, body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field
    assert healthy(server)


@pytest.mark.engine
@pytest.mark.xdist_group("server")
@pytest.mark.parametrize("body", [{"new_data_parallel_size": 2}, [], None])
def test_a_server_that_cannot_scale_says_so(server: Client, body: Any) -> None:
    response = httpx.post(f"{server.root}/scale_elastic_ep", json=body, timeout=60)
    assert response.status_code == 400, response.text
    assert "--enable-elastic-ep" in response.text


@pytest.mark.engine
@pytest.mark.xdist_group("server")
def test_items_to_score_have_no_media_tokens(server: Client) -> None:
    body = {"query": "x", "items": ["a", "<|VIDEO|>"], "label_token_ids": [1, 2]}
    response = httpx.post(f"{server.root}/generative_scoring", json=body, timeout=60)
    assert response.status_code == 400, response.text


@pytest.mark.engine
@pytest.mark.xdist_group("server")
@pytest.mark.parametrize(
    "medium", [image(make_image()), video(make_clip(1))], ids=["image", "clip"]
)
def test_a_marker_beside_a_medium_is_refused(server: Client, medium: dict[str, Any]) -> None:
    messages = user(medium, text("What is <|vision_"), text("bos|> here?"))
    response = post(server, "chat/completions", {"messages": messages})
    assert response.status_code == 400, response.text
    assert "<|vision_bos|>" in response.text


@pytest.mark.engine
@pytest.mark.xdist_group("server")
@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("chat/completions", {"messages": HELLO}),
        ("completions", {"prompt": "x"}),
        ("responses", {"input": "x"}),
    ],
)
def test_a_grammar_that_leads_nowhere_is_the_clients_error(
    server: Client, route: str, body: dict[str, Any]
) -> None:
    response = post(server, route, {"structured_outputs": {"regex": NOTHING_FOLLOWS}, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == "structured_outputs"
    assert "allows nothing after 1 tokens" in error["message"]
    assert healthy(server)


@pytest.mark.engine
@pytest.mark.xdist_group("server")
def test_a_grammar_that_cannot_be_compiled_is_the_clients_error(server: Client) -> None:
    schema = {"type": "string", "minLength": -1, "maxLength": 1}
    response = post(server, "chat/completions", {"structured_outputs": {"json": schema}})
    assert response.status_code == 400, response.text
    assert "cannot be compiled" in response.json()["error"]["message"]


@pytest.mark.engine
@pytest.mark.xdist_group("server")
def test_a_stream_ends_with_why_its_grammar_leads_nowhere(server: Client) -> None:
    given = {"structured_outputs": {"regex": NOTHING_FOLLOWS}, "stream": True}
    response = post(server, "chat/completions", given)
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line[6:7] == "{"]
    assert events[-1]["error"]["code"] == 400
    assert "allows nothing after 1 tokens" in events[-1]["error"]["message"]


@pytest.mark.engine
@pytest.mark.xdist_group("server")
def test_media_of_a_request_that_was_refused_late_can_be_sent_again(server: Client) -> None:
    messages = user(video(make_clip(1, seed=71)), text("What is it?"))
    refused = {"messages": messages, "logprobs": True, "top_logprobs": 1_000}
    assert post(server, "chat/completions", refused).status_code == 400
    assert post(server, "chat/completions", {"messages": messages}).status_code == 200
