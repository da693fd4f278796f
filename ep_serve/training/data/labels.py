"""What each AV token of a made-up clip shows: targets of the dense losses.

Every class 0 means "nothing".
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_serve.scenes.pictures import box
from ep_serve.scenes.scene import COLOURS, MOST_SLOTS, MOTIONS, PLACES, SHAPES, SOUNDS, Scene
from ep_serve.training.data.clips import Clip

_COLOUR = {name: number for number, name in enumerate(COLOURS, start=1)}
_SHAPE = {name: number for number, name in enumerate(SHAPES, start=1)}
_SOUND = {name: number for number, name in enumerate(SOUNDS, start=1)}
_PLACE = {name: number for number, name in enumerate(PLACES, start=1)}
_MOTION = {name: number for number, name in enumerate(MOTIONS, start=1 + len(PLACES))}

CONTENT = {
    "colour": 1 + len(COLOURS),
    "shape": 1 + len(SHAPES),
    "where": 1 + len(PLACES) + len(MOTIONS),
    "sound": 1 + len(SOUNDS),
}
"""What goes on in a second, and the number of classes."""
COURSE = {
    **dict.fromkeys(("sight begins", "sound begins"), 3),
    **dict.fromkeys(
        (
            *("sight number", "sound number", "sights", "sounds"),
            *("like its colour", "like its shape", "like its sound"),
        ),
        1 + MOST_SLOTS,
    ),
}
"""What counting and order rest on, and the number of classes.

Whether a second begins something or goes on with it; the how-manieth it is; how many there are in
the whole clip, and how many of its colour, shape and sound.
"""
ASPECTS = CONTENT | COURSE
TOKENS_PER_SECOND = 25
COVERED = 0.12
"""Share of a token's square that a shape must reach over (each way) to count as seen in it."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Truth about a clip, token by token.

    Attributes:
        pairs: {aspect: (S,)} for each pair of frames, as far as the two frames show it.
        covers: (S, rows, columns) bool, whether the shape reaches into the token.
        heard: (n,) int64, the sound at each audio token.
    """

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
    seconds = tell_seconds(scene)
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
        pairs={a: seconds[a] * shown for a in ("colour", "shape", "where")},
        covers=covers,
        heard=heard,
    )


def tell_seconds(scene: Scene) -> dict[str, NDArray[np.int64]]:
    """{aspect: (S,) int64}, what goes on in each second of a scene."""
    told = {aspect: np.zeros(scene.seconds, dtype=np.int64) for aspect in ASPECTS}
    colours = Counter(sight.colour for sight in scene.sights)
    shapes = Counter(sight.shape for sight in scene.sights)
    names = Counter(sound.name for sound in scene.sounds)
    told["sights"][:] = len(scene.sights)
    told["sounds"][:] = len(scene.sounds)
    for number, sight in enumerate(scene.sights, start=1):
        during = slice(int(sight.start), math.ceil(sight.end))
        told["colour"][during] = _COLOUR[sight.colour]
        told["shape"][during] = _SHAPE[sight.shape]
        told["where"][during] = _where(sight.place, sight.motion)
        told["like its colour"][during] = colours[sight.colour]
        told["like its shape"][during] = shapes[sight.shape]
        _tell_course(told, "sight", during, number)
    for number, sound in enumerate(scene.sounds, start=1):
        during = slice(int(sound.start), math.ceil(sound.end))
        told["sound"][during] = _SOUND[sound.name]
        told["like its sound"][during] = names[sound.name]
        _tell_course(told, "sound", during, number)
    return told


def _tell_course(told: dict[str, NDArray[np.int64]], what: str, during: slice, number: int) -> None:
    told[f"{what} number"][during] = number
    told[f"{what} begins"][during] = 2
    told[f"{what} begins"][during.start] = 1


def _where(place: str | None, motion: str | None) -> int:
    return _MOTION[motion] if motion is not None else _PLACE[place or ""]


def _reach(where: tuple[float, float, float, float], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """(rows, columns) bool, the tokens that a box reaches into."""
    left, top, right, bottom = where
    rows, columns = np.arange(grid[0]), np.arange(grid[1])
    down = (top * grid[0] < rows + 1 - COVERED) & (bottom * grid[0] > rows + COVERED)
    across = (left * grid[1] < columns + 1 - COVERED) & (right * grid[1] > columns + COVERED)
    return np.outer(down, across)
