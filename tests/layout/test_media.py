from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest

from ep_serve.layout import Audio, Image, Kind, MediumShape, Video, audio_token_count, video_tokens


@pytest.mark.parametrize(
    ("mel_frames", "tokens"), [(0, 0), (2, 0), (3, 1), (250, 62), (410, 102), (3000, 750)]
)
def test_mel_frames_become_25_audio_tokens_a_second(mel_frames: int, tokens: int) -> None:
    assert audio_token_count(mel_frames) == tokens


def test_a_negative_number_of_mel_frames_is_refused() -> None:
    with pytest.raises(ValueError, match="mel_frames must be at least 0, not -1"):
        audio_token_count(-1)


def test_merged_patches_become_video_tokens() -> None:
    assert video_tokens((4, 8, 12), 2) == 96


@pytest.mark.parametrize("grid", [(1, 7, 8), (1, 8, 7)])
def test_a_grid_that_cannot_be_merged_is_refused(grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="divisible by 2"):
        video_tokens(grid, 2)


def test_each_medium_knows_its_kind() -> None:
    media: list[MediumShape] = [Video((1, 2, 2), 1.0), Audio(1), Image((1, 2, 2))]
    assert [medium.kind for medium in media] == [Kind.VIDEO, Kind.AUDIO, Kind.IMAGE]


def test_a_sound_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Audio\.tokens must be at least 1, not 0"):
        Audio(0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_needs_time_between_its_frames(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"Video\.second_per_grid must be finite and above 0"):
        Video((1, 2, 2), seconds)


def test_a_negative_number_of_audio_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Video\.audio_tokens must be at least 0, not -1"):
        Video((1, 2, 2), 1.0, -1)


@pytest.mark.parametrize("medium", [partial(Video, second_per_grid=1.0), Image])
def test_a_grid_needs_three_positive_numbers(medium: Callable[..., MediumShape]) -> None:
    with pytest.raises(
        ValueError, match=r"grid_thw must be three positive numbers, not \(0, 2, 2\)"
    ):
        medium(grid_thw=(0, 2, 2))
