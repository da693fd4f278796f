from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from ep_serve.media import (
    DecodeCounter,
    MediaError,
    MediaLimits,
    SamplingRule,
    decode_clip,
    decode_image,
    decode_sound,
)
from tests.clips import make_changing_clip, make_clip, make_image, make_wav

RULE = SamplingRule()


@pytest.mark.parametrize(
    "field",
    ["max_duration_s", "max_pixels", "max_aspect", "max_frames", "max_clip_bytes", "timeout_s"],
)
def test_a_limit_that_allows_nothing_names_its_field(field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be above 0, got 0"):
        MediaLimits(**{field: 0})


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_a_long_video_is_refused(container: str) -> None:
    data = make_clip(4, container=container)
    with pytest.raises(MediaError, match=r"^the video lasts 4\.\d s; the limit is 3 s$"):
        decode_clip(data, RULE, MediaLimits(max_duration_s=3))


def test_a_clip_with_long_sound_is_refused() -> None:
    data = make_clip(1, sound_seconds=4, container="mpegts")
    with pytest.raises(MediaError, match="the sound lasts longer than the limit of 2 s"):
        decode_clip(data, RULE, MediaLimits(max_duration_s=2))


def test_a_video_of_too_many_frames_is_refused() -> None:
    with pytest.raises(MediaError, match="more than the limit of 31 frames"):
        decode_clip(make_clip(), RULE, MediaLimits(max_frames=31))


def test_a_video_of_large_frames_is_refused() -> None:
    with pytest.raises(MediaError, match=r"112x112 = 12544 pixels; the limit is 12543 pixels"):
        decode_clip(make_clip(), RULE, MediaLimits(max_pixels=12543))


def test_a_video_whose_frames_grow_past_the_limit_is_refused() -> None:
    data = make_changing_clip([(64, 64)] * 8 + [(256, 256)] * 8)
    with pytest.raises(MediaError, match="only 2 of 4 sampled pictures can be decoded"):
        decode_clip(data, RULE, MediaLimits(max_pixels=10_000))


def test_a_clip_that_needs_too_much_memory_is_refused() -> None:
    with pytest.raises(
        MediaError,
        match="8 pictures of 112x112 pixels take 301056 bytes; the limit for a clip is 301055",
    ):
        decode_clip(make_clip(), RULE, MediaLimits(max_clip_bytes=301_055))


def test_a_clip_made_small_needs_little_memory() -> None:
    limits = MediaLimits(max_clip_bytes=301_055)
    clip = decode_clip(make_clip(), RULE, limits, size=lambda height, width: (56, 56))
    assert clip.frames.nbytes == 75_264


def test_decoding_stops_when_its_time_is_over() -> None:
    limits = MediaLimits(timeout_s=1e-9)
    sentence = "^the file takes longer to decode than the limit of 1e-09 s$"
    with pytest.raises(MediaError, match=sentence):
        decode_clip(make_clip(), RULE, limits)
    with pytest.raises(MediaError, match=sentence):
        decode_sound(make_wav(), limits)
    with pytest.raises(MediaError, match=sentence):
        decode_image(make_image(), limits)


def test_decoding_a_long_file_stops_midway() -> None:
    data = make_clip(2, container="mpegts", sound_rate=None) * 200
    with pytest.raises(MediaError, match=r"longer to decode than the limit of 0\.02 s"):
        decode_clip(data, RULE, MediaLimits(timeout_s=0.02))


def test_decodes_are_counted_by_kind_from_many_threads() -> None:
    counter = DecodeCounter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: counter.add("video"), range(1000)))
    assert counter.value("video") == 1000
    assert counter.value("audio") == 0
