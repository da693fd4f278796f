"""What each AV token of a made-up clip shows: targets of the dense losses.

Every class 0 means "nothing".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_serve.training.clips import Clip
from ep_serve.training.pictures import box
from ep_serve.training.scenes import COLOURS, MOTIONS, PLACES, SHAPES, SOUNDS, Scene

_COLOUR = {name: number for number, name in enumerate(COLOURS, start=1)}
_SHAPE = {name: number for number, name in enumerate(SHAPES, start=1)}
_SOUND = {name: number for number, name in enumerate(SOUNDS, start=1)}
_PLACE = {name: number for number, name in enumerate(PLACES, start=1)}
_MOTION = {name: number for number, name in enumerate(MOTIONS, start=1 + len(PLACES))}

ASPECTS = {
    "colour": 1 + len(COLOURS),
    "shape": 1 + len(SHAPES),
    "where": 1 + len(PLACES) + len(MOTIONS),
    "sound": 1 + len(SOUNDS),
}
"""What is asked of a token, and the number of classes."""
TOKENS_PER_SECOND = 25
COVERED = 0.12
"""Share of a token's square that a shape must reach over (each way) to count as seen in it."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Truth about a clip, token by token.

    Attributes:
        seconds: {aspect: (S,) int64} for each second of the clip.
        pairs: {aspect: (S,)} for each pair of frames, as far as the two frames show it.
        covers: (S, rows, columns) bool, whether the shape reaches into the token.
        heard: (n,) int64, the sound at each audio token.
    """

    seconds: dict[str, NDArray[np.int64]]
    pairs: dict[str, NDArray[np.int64]]
    covers: NDArray[np.bool_]
    heard: NDArray[np.int64]


def label(scene: Scene, clip: Clip, grid: tuple[int, int], audio_tokens: int) -> Labels:
    """Say what the tokens of a clip show.

    Args:
        scene: What happens in it.
        clip: The same scene, drawn.
        grid: Rows and columns of video tokens.
        audio_tokens: Tokens of its sound.
    """
    seconds = {aspect: np.zeros(scene.seconds, dtype=np.int64) for aspect in ASPECTS}
    for second in range(scene.seconds):
        if sight := scene.sight_in(second):
            seconds["colour"][second] = _COLOUR[sight.colour]
            seconds["shape"][second] = _SHAPE[sight.shape]
            seconds["where"][second] = _where(sight.place, sight.motion)
        if sound := scene.sound_in(second):
            seconds["sound"][second] = _SOUND[sound.name]
    covers = np.zeros((scene.seconds, *grid), dtype=bool)
    for second, pair in enumerate(clip.moments.reshape(-1, 2)):
        sight = scene.sight_in(second)
        for moment in pair:
            if sight and sight.start <= moment < sight.end:
                covers[second] |= _reach(box(sight, moment, clip.size), grid)
    shown = covers.any(axis=(1, 2))
    heard = np.zeros(audio_tokens, dtype=np.int64)
    middles = (np.arange(audio_tokens) + 0.5) / TOKENS_PER_SECOND
    for sound in scene.sounds:
        heard[(sound.start <= middles) & (middles < sound.end)] = _SOUND[sound.name]
    return Labels(
        seconds=seconds,
        pairs={a: seconds[a] * shown for a in ("colour", "shape", "where")},
        covers=covers,
        heard=heard,
    )


def _where(place: str | None, motion: str | None) -> int:
    return _MOTION[motion] if motion is not None else _PLACE[place or ""]


def _reach(where: tuple[float, float, float, float], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """(rows, columns) bool, the tokens that a box reaches into."""
    left, top, right, bottom = where
    rows, columns = np.arange(grid[0]), np.arange(grid[1])
    down = (top * grid[0] < rows + 1 - COVERED) & (bottom * grid[0] > rows + COVERED)
    across = (left * grid[1] < columns + 1 - COVERED) & (right * grid[1] > columns + COVERED)
    return np.outer(down, across)
