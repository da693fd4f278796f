"""A content part has one content."""

from __future__ import annotations

import pytest

from ep_serve.contract.content_parts import content_fields


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ({"type": "text", "text": "x", "cache_control": {}}, ["text"]),
        ({"type": "input_image", "image_url": "x", "detail": "auto"}, ["image_url"]),
        ({"type": "input_audio", "input_audio": {}}, ["input_audio"]),
        ({"type": "text", "text": "x", "image": 1}, ["image", "text"]),
        ({"type": "video_url", "video_url": {}, "My_AUDIO": None}, ["My_AUDIO", "video_url"]),
        ({"type": "file"}, []),
    ],
)
def test_the_fields_with_a_content_are_found(part: dict[str, object], fields: list[str]) -> None:
    assert content_fields(part) == fields
