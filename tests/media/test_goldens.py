"""Decoded clips equal, bit for bit, what the reference processor was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ep_serve.media import MediaLimits, SamplingRule, decode_clip, decode_sound
from tests.goldens import CASES, CLIPS, load_case, needs_goldens

pytestmark = needs_goldens

LIMITS = MediaLimits()


def _rule(case: dict[str, Any]) -> SamplingRule:
    return SamplingRule(fps=case["processor_kwargs"].get("fps", 2.0))


def _videos() -> list[tuple[str, int]]:
    return [(name, i) for name in CASES for i in range(len(load_case(name)[0]["media"]))]


@pytest.mark.parametrize(("name", "index"), _videos())
def test_the_frames_of_a_clip_equal_those_the_processor_was_given(name: str, index: int) -> None:
    case, tensors = load_case(name)
    data = (CLIPS.parent / case["media"][index]["path"]).read_bytes()
    clip = decode_clip(data, _rule(case), LIMITS)
    np.testing.assert_array_equal(clip.frames, tensors[f"media.video{index}.frames_u8"].numpy())


@pytest.mark.parametrize(("name", "index"), _videos())
def test_the_rate_of_a_clip_is_that_of_the_frames_chosen(name: str, index: int) -> None:
    case, _ = load_case(name)
    medium = case["media"][index]
    clip = decode_clip((CLIPS.parent / medium["path"]).read_bytes(), _rule(case), LIMITS)
    expected = len(medium["frame_indices"]) / medium["total_frames"] * medium["container_fps"]
    assert clip.fps == expected
    assert clip.duration_s == medium["total_frames"] / medium["container_fps"]


@pytest.mark.parametrize(
    ("name", "file"),
    [("aiv_a_r020", "a.mp4"), ("aiv_b_r020", "b.mp4"), ("aiv_f_short_audio_r020", "f.mp4")],
)
def test_the_sound_of_a_clip_equals_the_reference_waveform(name: str, file: str) -> None:
    _, tensors = load_case(name)
    clip = decode_clip((CLIPS / file).read_bytes(), SamplingRule(), LIMITS)
    assert clip.sound is not None
    np.testing.assert_array_equal(clip.sound, tensors["media.audio0.waveform"].numpy())


def test_a_wav_equals_the_reference_waveform() -> None:
    _, tensors = load_case("audio_d_r020")
    sound = decode_sound((CLIPS / "d.wav").read_bytes(), LIMITS)
    np.testing.assert_array_equal(sound, tensors["media.audio0.waveform"].numpy())


def test_the_reference_clip_without_sound_is_silent() -> None:
    assert decode_clip((CLIPS / "c.mp4").read_bytes(), SamplingRule(), LIMITS).sound is None
