"""Which frames of a video are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FRAMES_PER_PATCH = 2
"""Frames that share one video token (`temporal_patch_size` of the Qwen family)."""


@dataclass(frozen=True, slots=True)
class SamplingRule:
    """How densely a video is sampled.

    The defaults are those of the package qwen-omni-utils (`smart_nframes`): two frames a second,
    at least 4 and at most 768 of them.

    Raises:
        ValueError: a rate that is not above zero, or frame counts that are out of order.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768

    def __post_init__(self) -> None:
        if not self.fps > 0:
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if self.min_frames < 1:
            raise ValueError(f"min_frames must be at least 1, got {self.min_frames}")
        if self.max_frames < max(self.min_frames, FRAMES_PER_PATCH):
            raise ValueError(
                f"max_frames must be at least {max(self.min_frames, FRAMES_PER_PATCH)}, "
                f"got {self.max_frames}"
            )


@dataclass(frozen=True, slots=True)
class Choice:
    """The frames to keep: `indices` (T,) int64 ascending, T even, and their rate in frames/s."""

    indices: NDArray[np.int64]
    fps: float


def count_frames(total: int, rate: float, rule: SamplingRule) -> int:
    """How many of `total` frames, shown at `rate` frames/s, are kept: an even number, at least 2.

    The arithmetic is that of `smart_nframes` in qwen-omni-utils, in Python floats: its results
    near a whole number depend on the order of the operations.
    """
    if total < FRAMES_PER_PATCH:
        return FRAMES_PER_PATCH
    least = -(-rule.min_frames // FRAMES_PER_PATCH) * FRAMES_PER_PATCH
    most = min(rule.max_frames, total) // FRAMES_PER_PATCH * FRAMES_PER_PATCH
    wanted = total / rate * rule.fps
    return int(min(max(wanted, least), most, total) // FRAMES_PER_PATCH) * FRAMES_PER_PATCH


def choose_frames(
    total: int, rate: float, rule: SamplingRule, times: NDArray[np.int64] | None = None
) -> Choice:
    """Choose the frames to look at.

    Frames at a constant rate are chosen by index, `linspace(0, total - 1, n).round()`, as
    qwen-omni-utils does. Frames at a variable rate are chosen by time: those on screen at `n`
    moments evenly spaced from the first frame to the last, so a long-held frame may come twice.

    Args:
        total: frames in the video, at least 1. A single frame is shown twice.
        rate: frames/s, the mean where the rate varies.
        rule: how densely to sample.
        times: (total,) presentation times, ascending, in any unit; None where they are unknown.
    """
    count = count_frames(total, rate, rule)
    if total == 1:
        return Choice(np.zeros(count, np.int64), rule.fps)
    if times is None or _is_steady(times):
        indices = np.linspace(0, total - 1, count).round().astype(np.int64)
    else:
        moments = np.linspace(times[0], times[-1], count)
        indices = np.searchsorted(times, moments, side="right").astype(np.int64) - 1
    return Choice(indices, count / total * rate)


def _is_steady(times: NDArray[np.int64]) -> bool:
    """True if no frame is more than half a frame away from a constant rate."""
    offsets: NDArray[np.float64] = (times - times[0]).astype(np.float64)
    step: Any = offsets[-1] / (len(times) - 1)
    drift = np.abs(offsets - step * np.arange(len(times)))
    return bool(drift.max() <= step / 2)
