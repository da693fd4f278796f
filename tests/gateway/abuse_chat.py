"""Hostile media, content parts and fields of chat requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx

from tests.clips import make_clip, make_image, make_wav
from tests.gateway.abuse_scene import Scene, case, inline
from tests.gateway.bombs import flac_bomb, opus_bomb, png_bomb

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
}


def _add_part(name: str, part: Any) -> None:
    @case(name, 400)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.ask([part])


for _name, _part in PARTS.items():
    _add_part(_name, _part)

FIELDS: dict[str, dict[str, Any]] = {
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


@case("a media token in two halves", 400)
async def split_token(scene: Scene) -> httpx.Response:
    halves = [{"type": "text", "text": text} for text in ("a <|VID", "EO|> b")]
    return await scene.ask(halves)


@case("a media token as a string", 400)
async def string_token(scene: Scene) -> httpx.Response:
    return await scene.ask(f"{TOKEN} hello")


@case("too many media", 400)
async def many_media(scene: Scene) -> httpx.Response:
    part = {"type": "image_url", "image_url": {"url": inline(make_image(28, 28))}}
    return await scene.ask([part] * 5)
