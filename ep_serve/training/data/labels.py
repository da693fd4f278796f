"""Per-token targets of the dense losses for synthetic clips.

Class 0 of every aspect means "nothing".
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep_serve.scenes.pictures import box
from ep_serve.scenes.scene import COLOURS, MAX_SLOTS, MOTIONS, PLACES, SHAPES, SOUNDS, Scene
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
"""Aspects of the events in a second, and their number of classes."""
PROGRESS = {
    **dict.fromkeys(("sight begins", "sound begins"), 3),
    **dict.fromkeys(
        (
            *("sight number", "sound number", "sights", "sounds"),
            *("like its colour", "like its shape", "like its sound"),
        ),
        1 + MAX_SLOTS,
    ),
}
"""Aspects for counting and order, and their number of classes.

Whether an event starts or continues in a second; its number in order; how many events the clip has,
and how many of the same colour, shape and sound.
"""
ASPECTS = CONTENT | PROGRESS
TOKENS_PER_SECOND = 25
COVERED = 0.12
"""Minimum overlap of a shape with a token's square, as a share of each side."""


@dataclass(frozen=True, slots=True)
class Labels:
    """Targets of the tokens of one clip.

    Attributes:
        pairs: {aspect: (S,)} for each pair of frames, 0 where the frames do not show it.
        covers: (S, rows, columns) bool, whether the shape overlaps the token's square.
        heard: (n,) int64, the sound at each audio token.
    """

    pairs: dict[str, NDArray[np.int64]]
    covers: NDArray[np.bool_]
    heard: NDArray[np.int64]


def label_tokens(scene: Scene, clip: Clip, grid: tuple[int, int], audio_tokens: int) -> Labels:
    """Compute the targets of the tokens of a clip.

    Args:
        scene: The scene of the clip.
        clip: The rendered scene.
        grid: Rows and columns of video tokens.
        audio_tokens: Number of its audio tokens.
    """
    seconds = label_seconds(scene)
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


def label_seconds(scene: Scene) -> dict[str, NDArray[np.int64]]:
    """Label each second of a scene: {aspect: (S,) int64}."""
    labels = {aspect: np.zeros(scene.seconds, dtype=np.int64) for aspect in ASPECTS}
    colours = Counter(sight.colour for sight in scene.sights)
    shapes = Counter(sight.shape for sight in scene.sights)
    names = Counter(sound.name for sound in scene.sounds)
    labels["sights"][:] = len(scene.sights)
    labels["sounds"][:] = len(scene.sounds)
    for number, sight in enumerate(scene.sights, start=1):
        during = slice(int(sight.start), math.ceil(sight.end))
        labels["colour"][during] = _COLOUR[sight.colour]
        labels["shape"][during] = _SHAPE[sight.shape]
        labels["where"][during] = _where(sight.place, sight.motion)
        labels["like its colour"][during] = colours[sight.colour]
        labels["like its shape"][during] = shapes[sight.shape]
        _label_progress(labels, "sight", during, number)
    for number, sound in enumerate(scene.sounds, start=1):
        during = slice(int(sound.start), math.ceil(sound.end))
        labels["sound"][during] = _SOUND[sound.name]
        labels["like its sound"][during] = names[sound.name]
        _label_progress(labels, "sound", during, number)
    return labels


def _label_progress(
    labels: dict[str, NDArray[np.int64]], what: str, during: slice, number: int
) -> None:
    labels[f"{what} number"][during] = number
    labels[f"{what} begins"][during] = 2
    labels[f"{what} begins"][during.start] = 1


def _where(place: str | None, motion: str | None) -> int:
    return _MOTION[motion] if motion is not None else _PLACE[place or ""]


def _reach(where: tuple[float, float, float, float], grid: tuple[int, int]) -> NDArray[np.bool_]:
    """(rows, columns) bool, the tokens that a box overlaps."""
    left, top, right, bottom = where
    rows, columns = np.arange(grid[0]), np.arange(grid[1])
    down = (top * grid[0] < rows + 1 - COVERED) & (bottom * grid[0] > rows + COVERED)
    across = (left * grid[1] < columns + 1 - COVERED) & (right * grid[1] > columns + COVERED)
    return np.outer(down, across)
