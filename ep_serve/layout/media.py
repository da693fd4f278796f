"""The media of a request, as far as a prompt needs to know them: how many tokens, and when."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ep_serve.layout.kinds import Kind

Grid = tuple[int, int, int]
"""(t, h, w) in patches, as Qwen2-VL's processors give it: h and w are not merged yet."""


@dataclass(frozen=True, slots=True)
class Video:
    """One clip.

    Attributes:
        grid_thw: Patches in time, height and width.
        second_per_grid: Seconds between two steps of the grid's time, 2 / sampled frames a second.
        audio_tokens: Tokens of the clip's own sound; 0 for a silent clip.

    Raises:
        ValueError: A field is out of its range.
    """

    kind: ClassVar[Kind] = Kind.VIDEO

    grid_thw: Grid
    second_per_grid: float
    audio_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be laid out."""
        _check_grid("Video", self.grid_thw)
        if not (math.isfinite(self.second_per_grid) and self.second_per_grid > 0):
            raise ValueError(
                f"Video.second_per_grid must be finite and above 0, not {self.second_per_grid!r}"
            )
        if self.audio_tokens < 0:
            raise ValueError(f"Video.audio_tokens must be at least 0, not {self.audio_tokens!r}")


@dataclass(frozen=True, slots=True)
class Audio:
    """One sound that belongs to no clip.

    Attributes:
        tokens: Audio tokens, at least one; see `audio_token_count`.

    Raises:
        ValueError: There is no token: the sound is shorter than three mel frames (30 ms).
    """

    kind: ClassVar[Kind] = Kind.AUDIO

    tokens: int

    def __post_init__(self) -> None:
        """Refuse a sound that gives no token."""
        if self.tokens < 1:
            raise ValueError(
                f"Audio.tokens must be at least 1, not {self.tokens!r}: "
                "the sound is empty or shorter than 30 ms"
            )


@dataclass(frozen=True, slots=True)
class Image:
    """One picture.

    Attributes:
        grid_thw: Patches in time (1), height and width.

    Raises:
        ValueError: The grid is not three positive numbers.
    """

    kind: ClassVar[Kind] = Kind.IMAGE

    grid_thw: Grid

    def __post_init__(self) -> None:
        """Refuse what cannot be laid out."""
        _check_grid("Image", self.grid_thw)


MediumShape = Video | Audio | Image


def audio_token_count(mel_frames: int) -> int:
    """Count the tokens that Qwen2.5-Omni's audio tower makes of `mel_frames` (100 a second).

    A convolution of stride 2 and a pooling of 2 leave 25 tokens a second; fewer than three frames
    leave none.

    Raises:
        ValueError: `mel_frames` is negative.
    """
    if mel_frames < 0:
        raise ValueError(f"mel_frames must be at least 0, not {mel_frames!r}")
    convolved = (mel_frames - 1) // 2 + 1
    return (convolved - 2) // 2 + 1


def video_tokens(grid: Grid, merge: int) -> int:
    """Count the tokens of a grid when `merge` x `merge` patches become one token.

    Raises:
        ValueError: The grid's height or width is no multiple of `merge`.
    """
    steps, rows, columns = grid
    if rows % merge or columns % merge:
        raise ValueError(
            f"grid_thw {tuple(grid)} must have a height and width divisible by {merge}"
        )
    return steps * (rows // merge) * (columns // merge)


def _check_grid(owner: str, grid: Grid) -> None:
    if len(grid) != 3 or min(grid) < 1:
        raise ValueError(f"{owner}.grid_thw must be three positive numbers, not {tuple(grid)}")
