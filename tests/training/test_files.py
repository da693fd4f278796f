from __future__ import annotations

import numpy as np
import pytest

from ep_serve.media import MediaLimits, SamplingRule, decode_clip
from ep_serve.scenes import sounds
from ep_serve.scenes.encoding import Encoding, encode
from ep_serve.scenes.pictures import draw
from ep_serve.scenes.scene import make_scene
from ep_serve.training.data.clips import make_clip

BOUNDS = (9 * 28 * 28, 9 * 28 * 28)
SCENE = make_scene(2, 5)


def decoded(encoding: Encoding) -> tuple[np.ndarray, float, np.ndarray | None]:
    clip = decode_clip(encode(SCENE, encoding), SamplingRule(), MediaLimits())
    return clip.frames, clip.fps, clip.sound


@pytest.mark.parametrize("fps", [8, 25, 30])
def test_a_file_shows_the_scene_on_the_clock_of_the_training(fps: int) -> None:
    frames, rate, _ = decoded(Encoding(size=(112, 112), fps=fps, crf=18))
    assert (len(frames), rate) == (10, 2.0)
    moments = np.linspace(0, 5 * fps - 1, 10).round() / fps
    drawn = draw(SCENE, moments, (112, 112))
    assert np.abs(frames.astype(int) - drawn).mean() < 4


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000])
def test_a_file_sounds_like_the_scene(rate: int) -> None:
    _, _, sound = decoded(Encoding(size=(64, 64), fps=8, sample_rate=rate))
    assert sound is not None
    wave = sounds.synthesize(SCENE)
    loud = [np.abs(w[: 5 * 16_000]).reshape(50, -1).max(axis=1) for w in (sound, wave)]
    assert np.corrcoef(*loud)[0, 1] > 0.9


def test_a_file_may_be_silent() -> None:
    assert decoded(Encoding(size=(64, 64), fps=8, sound=False))[2] is None


def test_a_training_clip_has_the_frames_and_length_of_a_file() -> None:
    clip = make_clip(SCENE, BOUNDS, degraded=False)
    frames, rate, sound = decoded(Encoding(size=clip.size, fps=8, sample_rate=16_000))
    assert sound is not None
    assert (len(frames), rate) == (len(clip.frames), clip.fps)
    assert abs(len(sound) - len(clip.sound)) <= 1024
