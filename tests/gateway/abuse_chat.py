"""Hostile media, content parts and fields of chat requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx

from ep_serve.contract.generation import DEFAULT_MAX_N, MAX_CHARS, MAX_ENTRIES
from ep_serve.contract.request_options import RequestOptions
from ep_serve.gateway.api.openapi import CHAT_OPENAPI
from tests.clips import make_clip, make_image, make_wav
from tests.gateway.abuse_scene import Scene, case, inline
from tests.gateway.bombs import flac_bomb, opus_bomb, png_bomb
from tests.gateway.mock_upstream import MODEL

TOKEN = "<|VIDEO|>"


MEDIA: dict[str, tuple[str, Callable[[], bytes], tuple[int, ...]]] = {
    "an opus bomb": ("audio_url", lambda: opus_bomb(200_000), (422,)),
    "a flac bomb": ("audio_url", lambda: flac_bomb(70), (422,)),
    "a picture bomb": ("image_url", lambda: png_bomb(30_000, 30_000), (415, 422)),
    "a wide picture": ("image_url", lambda: make_image(2_000, 4), (422,)),
    "a long sound": ("audio_url", lambda: make_wav(61, 4_000), (422,)),
    "a picture as video": ("video_url", make_image, (415,)),
    "a silent clip as sound": ("audio_url", lambda: make_clip(1, sound_rate=None), (415,)),
    "a clip as picture": ("image_url", lambda: make_clip(1), (415,)),
    "a playlist": ("video_url", lambda: b"#EXTM3U\nfile:///etc/passwd\n", (415,)),
    "a script": ("image_url", lambda: b"#!/bin/sh\nid\n", (415,)),
    "an svg": ("image_url", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", (415,)),
    "half a clip": ("video_url", lambda: make_clip(1)[:300], (415, 422)),
    "too many bytes": ("video_url", lambda: bytes((1 << 20) + 10), (413,)),
    "no bytes": ("video_url", lambda: b"", (400, 422)),
}


def _add_medium(name: str, kind: str, make: Callable[[], bytes], statuses: tuple[int, ...]) -> None:
    @case(f"{name}", *statuses)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.medium(kind, inline(make()))


for _name, (_kind, _make, _statuses) in MEDIA.items():
    _add_medium(_name, _kind, _make, _statuses)

PARTS: dict[str, Any] = {
    "a data URL that is not base64": {"type": "image_url", "image_url": {"url": "data:,hello"}},
    "base64 that is none": {"type": "image_url", "image_url": {"url": "data:;base64,@@@@"}},
    "embeddings": {"type": "image_embeds", "image_embeds": "AAAA"},
    "prompt embeddings": {"type": "prompt_embeds", "data": "AAAA"},
    "an id of a cached medium": {"type": "video_url", "video_url": None, "uuid": "a" * 64},
    "an id beside a medium": {
        "type": "image_url",
        "image_url": {"url": inline(make_image())},
        "uuid": "a" * 64,
    },
    "two media in one part": {
        "type": "image_url",
        "image_url": {"url": inline(make_image())},
        "video_url": {"url": "http://127.0.0.1/"},
    },
    "a medium beside a text": {"type": "text", "text": "x", "image_url": {"url": "http://x/"}},
    "a part without a type": {"image_url": {"url": "http://127.0.0.1/"}},
    "a part whose type is an object": {"type": {"type": "text"}, "text": "x"},
    "a part that is a string": "http://127.0.0.1/",
    "a url that is a list": {"type": "image_url", "image_url": {"url": ["http://127.0.0.1/"]}},
    "a media token in a part": {"type": "text", "text": f"a {TOKEN} b"},
    "a text that a template takes for a picture": {"type": "text", "text": "x", "image": 1},
    "a text that a template takes for a video": {"type": "text", "text": "x", "video": 1},
    "a picture that is a video too": {
        "type": "image_url",
        "image_url": {"url": inline(make_image())},
        "input_video": 1,
    },
}


def _add_part(name: str, part: Any) -> None:
    @case(name, 400)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.ask([part])


for _name, _part in PARTS.items():
    _add_part(_name, _part)


ENTRIES = {name: limit for name, limit in MAX_ENTRIES.items() if limit < 100_000}
"""More entries than that exceed the limit of the body first."""


def _object(size: int) -> dict[str, int]:
    return {str(number): 1 for number in range(size)}


FIELDS: dict[str, dict[str, Any]] = {
    "many answers": {"n": DEFAULT_MAX_N + 1},
    "an endless number of answers": {"n": 2**62},
    "many best answers": {"best_of": DEFAULT_MAX_N + 1},
    "a schema without an end": {"structured_outputs": {"json": {"$ref": "#"}}},
    "a grammar without an end": {"structured_outputs": {"grammar": "root ::= root"}},
    "a format without an end": {
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}
    },
    "a tool without an end": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}]
    },
    "a deep schema": {
        "structured_outputs": {"json": '{"items":' * 80 + "{}" + "}" * 80},
    },
    "many choices": {"structured_outputs": {"choice": ["a"] * 10_000}},
    "a long pattern of repetition": {"repetition_detection": {"max_pattern_size": 10**6}},
    **{f"a list of many {name}": {name: ["a"] * (n + 1)} for name, n in ENTRIES.items()},
    **{f"an object of many {n}": {n: _object(m + 1)} for n, m in ENTRIES.items()},
    **{f"a long text in {name}": {name: ["a" * (n + 1)]} for name, n in MAX_CHARS.items()},
    "a media token in a tool": {
        "tools": [{"type": "function", "function": {"name": "f", "description": TOKEN}}]
    },
    "a media token as a field": {"documents": [{TOKEN: "x"}]},
    "too many messages": {"messages": [{"role": "user", "content": "x"}] * 51},
    "too many parts": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 61}]
    },
    "a message that is a number": {"messages": [5]},
    "content that is an object": {"messages": [{"role": "user", "content": {"a": 1}}]},
    "a long model": {"model": "m" * 10_000},
    "options of the processor": {"mm_processor_kwargs": {"keep_ratio": 1.0}},
    "options of the decoder": {"media_io_kwargs": {"video": {"num_frames": 100_000}}},
    "a transfer between engines": {"kv_transfer_params": {"remote_host": "10.0.0.1"}},
    "a priority": {"priority": -100},
    "another's cache salt": {"cache_salt": "x"},
    "a template": {"chat_template": "{{ 1 }}"},
    "an endless keep ratio": {"keep_ratio": 10**400},
    "a negative keep ratio": {"keep_ratio": -0.1},
}


def _add_fields(name: str, fields: dict[str, Any]) -> None:
    @case(name, 400)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.ask("hello", **fields)


for _name, _fields in FIELDS.items():
    _add_fields(_name, _fields)


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    call = {"id": "1", "type": "function", "function": function}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


_LEFT, _RIGHT = "a <|VID", "EO|> b"
_HEADER = "x-anthropic-billing-header: x"
PIECES: dict[str, list[dict[str, Any]]] = {
    "text": [_user(f"{TOKEN} hello")],
    "two texts": [_user([_text(_LEFT), _text(_RIGHT)])],
    "two texts with space around": [_user([_text(f"{_LEFT}\n"), _text(f"\n {_RIGHT}")])],
    "many texts": [_user([_text(character) for character in TOKEN])],
    "a text and a refusal": [_user([_text(_LEFT), {"type": "refusal", "refusal": _RIGHT}])],
    "texts around a picture": [
        _user(
            [
                _text(_LEFT),
                {"type": "image_url", "image_url": {"url": inline(make_image())}},
                _text(_RIGHT),
            ]
        )
    ],
    "two messages": [_user(_LEFT), _user(_RIGHT)],
    "texts around a line that vLLM drops": [
        {"role": "system", "content": [_text(_LEFT), _text(f"{_HEADER}\n{_RIGHT}")]}
    ],
    "reasoning and content": [{"role": "assistant", "reasoning": _LEFT, "content": _RIGHT}],
    "content and refusal": [{"role": "assistant", "content": _LEFT, "refusal": _RIGHT}],
    "arguments": [_call("f", json.dumps({"a": TOKEN}))],
    "escaped arguments": [_call("f", '{"a": "\\u003c|VIDEO|\\u003e"}')],
    "two arguments": [_call("f", json.dumps({"a": _LEFT, "b": _RIGHT}))],
    "names of arguments": [_call("f", '{"\\u003c|VIDEO|>": 1}')],
    "a name and its arguments": [_call(_LEFT, json.dumps({"a": _RIGHT}))],
    "a name": [{"role": "user", "name": TOKEN, "content": "x"}],
    "a role": [{"role": TOKEN, "content": "x"}],
}
"""Messages of which a template can make a media token."""


def _add_pieces(name: str, messages: list[dict[str, Any]]) -> None:
    @case(f"a media token in {name}", 400)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.ask(None, messages=messages)


for _name, _messages in PIECES.items():
    _add_pieces(_name, _messages)


@case("arguments of many values", 400)
async def many_arguments(scene: Scene) -> httpx.Response:
    return await scene.ask(None, messages=[_call("f", f"[{'[],' * 50_000}[]]")] * 3)


@case("deep arguments", 400)
async def deep_arguments(scene: Scene) -> httpx.Response:
    return await scene.ask(None, messages=[_call("f", "[" * 10_000)])


# -- every place of a request ---------------------------------------------------------------------

LEAVES = {
    "an infinite number": "1e999",
    "a number below all": "-1e999",
    "no number": "NaN",
    "infinity": "Infinity",
    "an endless integer": "9" * 1_000,
    "an integer of more than 64 bits": str(2**64),
    "half of a surrogate pair": '"a\\ud800b"',
    "deep lists": "[" * 150 + "]" * 150,
    "deep objects": '{"a":' * 150 + "1" + "}" * 150,
    "a media token in many places": json.dumps([{"a": ["x", TOKEN]}]),
    "a media token as a key": json.dumps({TOKEN: 1}),
    "a list of many values": f"[{'[],' * 100_000}[]]",
}
"""What no field may hold, as JSON."""
HERE = "@here@"
OTHER_FIELDS = (
    "a_field_nobody_knows",
    "chat_template_kwargs",
    "n",
    "response_format",
    "structured_outputs",
    "tool_choice",
)
NOT_IN_PROMPT = ("stop", "bad_words")


def instances(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """For each place of a schema an instance that has `HERE` there, and the name of the place."""
    yield "", HERE
    for choice in schema.get("anyOf", ()):
        yield from instances(choice)
    if "items" in schema:
        for place, instance in instances(schema["items"]):
            yield f"[0]{place}", [instance]
    for name, inner in schema.get("properties", {}).items():
        for place, instance in instances(inner):
            yield f".{name}{place}", {**_sample(schema), name: instance}


def _sample(schema: dict[str, Any]) -> Any:
    if "const" in schema:
        return schema["const"]
    if "properties" in schema:
        inner = schema["properties"]
        return {name: _sample(inner[name]) for name in schema.get("required", ())}
    return [_sample(schema["items"])] if "items" in schema else "x"


def places() -> dict[str, str]:
    """JSON texts of chat requests with `HERE` in one place each."""
    content = CHAT_OPENAPI["requestBody"]["content"]["application/json"]
    schema = {**content["schema"]}
    others = {*OTHER_FIELDS, *MAX_ENTRIES, *MAX_CHARS, *RequestOptions.model_fields}
    schema["properties"] = {**{name: {} for name in others}, **schema["properties"]}
    found = {}
    for place, instance in instances(schema):
        if isinstance(instance, dict):
            found[place[1:]] = json.dumps({"model": MODEL, "messages": [_user("x")], **instance})
    return found


def _add_leaf(what: str, leaf: str, place: str, body: str) -> None:
    @case(f"{what} at {place}", 400)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.body(body.replace(f'"{HERE}"', leaf).encode())


for _place, _body in places().items():
    for _what, _leaf in LEAVES.items():
        if not ("token" in _what and _place.partition(".")[0] in NOT_IN_PROMPT):
            _add_leaf(_what, _leaf, _place, _body)


@case("too many media", 400)
async def many_media(scene: Scene) -> httpx.Response:
    part = {"type": "image_url", "image_url": {"url": inline(make_image(28, 28))}}
    return await scene.ask([part] * 5)


@case("too many large media", 400)
async def many_large_media(scene: Scene) -> httpx.Response:
    part = {"type": "image_url", "image_url": {"url": inline(bytes(90_000))}}
    return await scene.ask([part] * 20)
