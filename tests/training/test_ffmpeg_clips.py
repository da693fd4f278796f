"""Clips rendered by FFmpeg show what their scene describes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ep_serve.media import Clip, MediaLimits, SamplingRule, decode_clip
from ep_serve.scenes.ffmpeg_clips import VoiceError, encode
from ep_serve.scenes.scene import Scene, Sight, Sound

SCENE = Scene(
    seed=0,
    seconds=4,
    sights=(Sight(1.0, 2.0, "red", "ring", place="left", motion=None, radius=0.2),),
    sounds=(Sound(2.1, 2.9, "clicks", pitch=0.5, loudness=0.5),),
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    path = tmp_path_factory.mktemp("ffmpeg-clips") / "clip.mp4"
    encode(SCENE, "grey", path)
    return decode_clip(path.read_bytes(), SamplingRule(), MediaLimits())


def test_a_shape_is_shown_only_in_its_time_span(clip: Clip) -> None:
    red = (clip.frames[..., 0].astype(int) - clip.frames[..., 1] > 60).mean(axis=(1, 2))
    assert (red > 0.02).tolist() == [False] * 2 + [True] * 2 + [False] * 4


def test_a_ring_has_a_hole(clip: Clip) -> None:
    frame = clip.frames[2].astype(int)
    middle, edge = frame[120, 64], frame[120, 64 - 42]
    assert middle[0] - middle[1] < 30 < edge[0] - edge[1]


def test_a_sound_is_heard_only_in_its_time_span(clip: Clip) -> None:
    assert clip.sound is not None
    seconds = clip.sound[: 4 * 16_000].reshape(4, -1)
    assert np.abs(seconds).max(axis=1).argmax() == 2
    assert np.abs(seconds[[0, 1, 3]]).max() < 0.1 < np.abs(seconds[2]).max()


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_speech_is_mixed_in_between_the_sounds(tmp_path: Path, clip: Clip) -> None:
    path = tmp_path / "clip.mp4"
    encode(SCENE, "grey", path, speech=True)
    spoken = decode_clip(path.read_bytes(), SamplingRule(), MediaLimits())
    between = [0, 1, 3]
    assert (loudness(spoken)[between] > 9 * loudness(clip)[between]).all()


def loudness(clip: Clip) -> NDArray[np.float32]:
    """(4,) mean power of each second."""
    assert clip.sound is not None
    squares = np.square(clip.sound[: 4 * 16_000]).reshape(4, -1)
    mean: NDArray[np.float32] = squares.mean(axis=1)
    return mean


def test_speech_without_espeak_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(VoiceError, match="espeak-ng is not installed"):
        encode(SCENE, "grey", tmp_path / "clip.mp4", speech=True)
