from __future__ import annotations

import gc
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import av
import numpy as np
import pytest
from av.container import InputContainer
from PIL import Image

from ep_serve.media import Clip, MediaError, MediaLimits, SamplingRule, decode_clip, decodes
from tests.clips import make_changing_clip, make_clip, make_picture, read_number

RULE = SamplingRule()
LIMITS = MediaLimits()
EVENLY = [0, 4, 9, 13, 18, 22, 27, 31]


def _decode(data: bytes, **fields: Any) -> Clip:
    return decode_clip(data, RULE, LIMITS, **fields)


def _numbers(clip: Clip) -> list[int]:
    return [read_number(frame) for frame in clip.frames]


CONTAINERS = {
    "mp4": {},
    "mp4 with its header first": {"options": {"movflags": "faststart"}},
    "mp4 in fragments": {"options": {"movflags": "frag_keyframe+empty_moov"}},
    "mov": {"container": "mov"},
    "matroska": {"container": "matroska"},
    "webm, vp8": {"container": "webm", "codec": "libvpx"},
    "webm, vp9": {"container": "webm", "codec": "libvpx-vp9"},
    "webm, hidden frames": {
        **{"container": "webm", "codec": "libvpx"},
        "codec_options": {"auto-alt-ref": "1", "lag-in-frames": "16"},
    },
    "mpeg-ts": {"container": "mpegts"},
    "mpeg-ps": {"container": "mpeg", "codec": "mpeg2video", "sound_codec": "mp2", "fps": 25},
    "flv": {"container": "flv"},
    "avi, mpeg-4": {"container": "avi", "codec": "mpeg4", "sound_codec": "libmp3lame"},
    "avi, h.264 with b-frames": {"container": "avi", "sound_codec": "libmp3lame"},
    "gif": {"container": "gif", "codec": "gif", "sound_rate": None},
}


@pytest.mark.parametrize("fields", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_every_container_gives_the_frames_of_the_rule(fields: dict[str, Any]) -> None:
    clip = _decode(make_clip(4, **fields))
    total = 4 * fields.get("fps", 8)
    assert _numbers(clip) == np.linspace(0, total - 1, 8).round().astype(int).tolist()
    assert clip.fps == pytest.approx(2.0, rel=0.002)
    assert clip.duration_s == pytest.approx(4.0, rel=0.002)


def test_a_clip_is_contiguous_rgb_with_an_even_number_of_frames() -> None:
    clip = _decode(make_clip(size=(168, 112)))
    assert clip.frames.shape == (8, 112, 168, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.frames.flags.c_contiguous


def test_frames_look_like_the_pictures_that_were_encoded() -> None:
    clip = _decode(make_clip(codec="ffv1", container="matroska", pix_fmt="bgr0"))
    np.testing.assert_array_equal(clip.frames[2], make_picture(9))


def test_another_rate_keeps_more_frames() -> None:
    clip = decode_clip(make_clip(), SamplingRule(fps=4.0), LIMITS)
    assert len(clip.frames) == 16
    assert clip.fps == 4.0


def test_a_clip_without_sound_is_a_silent_clip() -> None:
    assert _decode(make_clip(sound_rate=None)).sound is None


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "flv"])
def test_a_clip_with_an_empty_sound_track_is_a_silent_clip(container: str) -> None:
    # A plain MP4 would lose its empty track, one in fragments keeps it.
    options = {"movflags": "frag_keyframe+empty_moov"} if container == "mp4" else {}
    data = make_clip(sound_seconds=0, container=container, options=options)
    with av.open(io.BytesIO(data)) as file:
        assert file.streams.audio
    assert _decode(data).sound is None


@pytest.mark.parametrize("seconds", [1, 2, 7])
def test_sound_shorter_or_longer_than_the_picture_is_kept_as_it_is(seconds: int) -> None:
    sound = _decode(make_clip(sound_seconds=seconds)).sound
    assert sound is not None
    assert len(sound) / 16_000 == pytest.approx(seconds, abs=0.1)


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_sound_that_starts_after_the_picture_is_preceded_by_silence(container: str) -> None:
    sound = _decode(make_clip(sound_start=1.0, sound_seconds=2, container=container)).sound
    assert sound is not None
    assert len(sound) / 16_000 == pytest.approx(3.0, abs=0.1)
    assert not sound[: int(0.9 * 16_000)].any()
    assert np.abs(sound[int(1.1 * 16_000) :]).max() > 0.3


def test_sound_that_starts_before_the_picture_loses_its_head() -> None:
    late = [1 + i / 8 for i in range(32)]
    sound = _decode(make_clip(times=late, sound_seconds=4, container="mpegts")).sound
    assert sound is not None
    assert len(sound) / 16_000 == pytest.approx(3.0, abs=0.1)


def test_the_sound_track_is_left_unread_if_sound_is_not_wanted() -> None:
    before = decodes.value("audio")
    assert _decode(make_clip(), sound=False).sound is None
    assert decodes.value("audio") == before


def test_of_several_sound_tracks_the_first_is_taken() -> None:
    two = _with_second_track(make_clip(sound_seconds=2), make_clip(sound_seconds=4))
    sound = _decode(two).sound
    assert sound is not None
    assert len(sound) / 16_000 == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize(
    ("frames", "numbers"), [(1, [0, 0]), (2, [0, 1]), (3, [0, 2]), (5, [0, 1, 3, 4])]
)
def test_a_very_short_video_is_served(frames: int, numbers: list[int]) -> None:
    assert _numbers(_decode(make_clip(frames / 8))) == numbers


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_variable_frame_rate_is_sampled_by_time(container: str) -> None:
    times = [0, 0.1, 0.2, 0.3, 5, 9.9, 10]
    clip = _decode(make_clip(times=times, container=container))
    assert _numbers(clip) == [0, 3, 3, 4, 4, 6]


def test_a_small_jitter_is_a_constant_rate() -> None:
    times = [i / 8 + 0.03 * (i % 2) for i in range(32)]
    assert _numbers(_decode(make_clip(times=times))) == EVENLY


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (-90, -1), (180, 2), (0, 0)])
def test_a_rotated_video_is_shown_upright(degrees: int, turns: int) -> None:
    clip = _decode(make_clip(rotation=degrees, size=(168, 112)))
    assert clip.frames.shape[1:3] == ((168, 112) if turns % 2 else (112, 168))
    assert [read_number(np.rot90(frame, -turns)) for frame in clip.frames] == EVENLY


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (0, 0)])
def test_a_mirrored_video_is_mirrored_back(degrees: int, turns: int) -> None:
    clip = _decode(make_clip(rotation=degrees, mirrored=True))
    turned = [np.rot90(frame[:, ::-1] if turns else frame, -turns) for frame in clip.frames]
    numbers = [read_number(frame if turns else frame[:, ::-1]) for frame in turned]
    assert numbers == EVENLY


@pytest.mark.parametrize(
    "fields",
    [
        {"size": (113, 111), "pix_fmt": "yuv444p"},
        {"pix_fmt": "yuv420p10le"},
        {"pix_fmt": "gray"},
        {"codec": "libvpx-vp9", "container": "webm", "pix_fmt": "yuva420p"},
        {"codec": "png", "container": "mov", "pix_fmt": "rgba"},
    ],
    ids=["odd size", "10 bits", "grey", "alpha in vp9", "alpha in png"],
)
def test_any_pixel_format_becomes_rgb(fields: dict[str, Any]) -> None:
    assert _numbers(_decode(make_clip(**fields))) == EVENLY


def test_frames_of_a_stream_that_changes_size_get_the_size_of_the_first() -> None:
    clip = _decode(make_changing_clip([(112, 96)] * 16 + [(64, 80)] * 16))
    assert clip.frames.shape == (8, 96, 112, 3)
    assert _numbers(clip) == EVENLY


def test_frames_can_be_made_small_as_they_are_decoded() -> None:
    data = make_clip(size=(168, 112), codec="ffv1", container="matroska", pix_fmt="bgr0")
    clip = _decode(data, size=lambda height, width: (height // 2, width // 2))
    whole = Image.fromarray(make_picture(0, (168, 112)))
    expected = np.asarray(whole.resize((84, 56), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(clip.frames[0], expected)


def test_frames_of_the_wanted_size_keep_their_pixels() -> None:
    data = make_clip(size=(168, 112))
    same = _decode(data, size=lambda height, width: (height, width))
    np.testing.assert_array_equal(same.frames, _decode(data).frames)


def test_the_wanted_size_is_asked_for_the_upright_frame() -> None:
    asked = []

    def size(height: int, width: int) -> tuple[int, int]:
        asked.append((height, width))
        return height, width

    _decode(make_clip(size=(168, 112), rotation=90), size=size)
    assert asked == [(168, 112)]


def test_clips_decode_the_same_in_many_threads_at_once() -> None:
    data = [make_clip(seed=seed) for seed in range(4)]
    alone = [_decode(d) for d in data]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(_decode, data * 4))
    for index, clip in enumerate(together):
        np.testing.assert_array_equal(clip.frames, alone[index % 4].frames)
        np.testing.assert_array_equal(clip.sound, alone[index % 4].sound)


@pytest.mark.parametrize("cut", [False, True], ids=["good file", "damaged file"])
def test_containers_are_closed_without_the_garbage_collector(cut: bool) -> None:
    data = make_clip(options={"movflags": "faststart"})
    gc.collect()
    gc.disable()
    try:
        try:
            _decode(data[: len(data) // 2] if cut else data)
        except MediaError:
            assert cut
        left = [o for o in gc.get_objects() if type(o) is InputContainer]
        assert not left
    finally:
        gc.enable()


def test_a_clip_counts_as_one_video_and_one_sound() -> None:
    before = [decodes.value(kind) for kind in ("video", "audio", "image")]
    _decode(make_clip())
    after = [decodes.value(kind) for kind in ("video", "audio", "image")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 0]


def _with_second_track(first: bytes, second: bytes) -> bytes:
    """The picture and sound of `first`, then the sound of `second`."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(first), "r") as one,
        av.open(io.BytesIO(second), "r") as two,
        av.open(file, "w", format="matroska") as output,
    ):
        sources = [(one, one.streams.video[0]), (one, one.streams.audio[0])]
        targets = {id(s): output.add_stream_from_template(s) for _, s in sources}
        other = output.add_stream_from_template(two.streams.audio[0])
        for packet in one.demux():
            if packet.dts is not None:
                packet.stream = targets[id(packet.stream)]
                output.mux(packet)
        for sound in two.demux(two.streams.audio[0]):
            if sound.dts is not None:
                sound.stream = other
                output.mux(sound)
    return file.getvalue()
