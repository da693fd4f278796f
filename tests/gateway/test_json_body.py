"""Reading JSON bodies piece by piece."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_serve.gateway.body.json_body import MAX_DEPTH, MAX_VALUES, JsonBody
from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.inlined import MIN_MEDIA_BYTES

MIB = 1 << 20
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
MEDIUM = bytes(range(256)) * 64


def read(text: bytes, *cuts: int) -> JsonBody:
    body = JsonBody(4 * MIB)
    ends = sorted(cut % (len(text) + 1) for cut in cuts)
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        body.feed(text[start:end])
    return body


@given(st.dictionaries(st.text(), VALUES), st.booleans(), st.lists(st.integers(0), max_size=8))
def test_a_body_means_the_same_in_whatever_pieces_it_comes(
    given: dict[str, Any], ascii_only: bool, cuts: list[int]
) -> None:
    text = json.dumps(given, ensure_ascii=ascii_only).encode("utf-8", "replace")
    assert read(text, *cuts).parse() == json.loads(text)


def escaped(text: str, how: str) -> str:
    """Base64 as serializers write it."""
    codes = {"slash": {"/": "\\/"}, "unicode": {c: f"\\u{ord(c):04x}" for c in "/+="}, "plain": {}}
    return "".join(codes[how].get(character, character) for character in text)


@given(
    st.sampled_from(["plain", "slash", "unicode"]),
    st.lists(st.integers(0), max_size=8),
    st.integers(0, 2),
)
def test_inlined_media_are_decoded_on_the_way(how: str, cuts: list[int], more: int) -> None:
    content = MEDIUM + bytes(more)
    url = "data:video/mp4;base64," + escaped(base64.b64encode(content).decode(), how)
    text = f'{{"a": "b\\"", "video_url": {{"url" :  "{url}"}}, "c": [1, "d"]}}'.encode()
    body = read(text, *cuts)
    parsed = body.parse()
    medium = body.media[parsed["video_url"]["url"]]
    assert medium.valid
    assert b"".join(medium.pieces) == content
    assert medium.start == b"data:video/mp4;base64,"
    assert parsed == {"a": 'b"', "video_url": {"url": parsed["video_url"]["url"]}, "c": [1, "d"]}


def test_a_long_string_under_another_name_stays_where_it_is() -> None:
    text = "A" * (4 * MIN_MEDIA_BYTES)
    body = read(json.dumps({"text": text, "b": {"url": "http://a/"}}).encode(), 5, 20_000)
    assert body.parse() == {"text": text, "b": {"url": "http://a/"}}
    assert not body.media


@pytest.mark.parametrize("end", ["=AAAA", "A", "AAA*", "\\n", "é", '\\"AAA', "\\u0041"])
def test_what_is_not_base64_is_dropped(end: str) -> None:
    text = f'{{"data": "{"A" * 4 * MIN_MEDIA_BYTES}{end}"}}'.encode()
    body = read(text, *range(1_000, len(text), 1_000))
    medium = body.media[body.parse()["data"]]
    assert not medium.valid
    assert not medium.memory_bytes


@pytest.mark.parametrize(
    ("text", "code", "status"),
    [
        (b'{"a":[' + b"[]," * MAX_VALUES, "too_many_values", 400),
        (b'{"a":{' + b'"":0,' * MAX_VALUES, "too_many_values", 400),
        (b'{"a":' * (MAX_DEPTH + 1), "too_deep", 400),
        (b"]" * MIB, "invalid_json", 400),
        (b'{"a":"' + b"\\u0000" * MIB, "body_too_large", 413),
        (b" " * 5 * MIB, "body_too_large", 413),
        (b'{"text":"data:;base64,' + b"A" * 5 * MIB, "body_too_large", 413),
    ],
)
def test_a_body_that_would_cost_too_much_is_refused_before_its_end(
    text: bytes, code: str, status: int
) -> None:
    with pytest.raises(ApiError) as refused:
        read(text, *range(0, len(text), 65_536))
    assert (refused.value.code, refused.value.status) == (code, status)


def test_half_of_a_surrogate_pair_is_named() -> None:
    with pytest.raises(ApiError) as refused:
        read(b'{"messages": [{"role": "user", "content": "a\\ud83d"}]}').parse()
    assert refused.value.param == "messages[0].content"
