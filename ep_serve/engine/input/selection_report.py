"""The selection of a request, as `return_selection` reports it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ep_serve.layout import Audio, Image, Kind, Video

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ep_serve.layout import MediumShape

MERGED = 2
"""Patches along each side of one token."""

SECONDS_PER_AUDIO_TOKEN = 0.04
SCORE_DIGITS = 4


@dataclass(frozen=True)
class PoolShape:
    """A pool of n tokens, as it is known before the sieve has run."""

    shapes: Sequence[MediumShape]
    """The media of the request, in prompt order."""
    kinds: npt.NDArray[np.int8]
    """(n,), see `Kind`."""
    media: npt.NDArray[np.int32]
    """(n,) index of the medium."""


def describe(
    pool: PoolShape, indices: npt.NDArray[np.int32], scores: npt.NDArray[np.float32] | None
) -> list[dict[str, Any]]:
    """The survivors medium by medium, as `usage.reduction.selection` gives them.

    Args:
        pool: That of the request.
        indices: (K,) places of the survivors in the pool.
        scores: (n,), from a sieve that ranks all tokens of the pool.

    Returns:
        For each medium its `type` and, as far as it has them:
        `video`: `grid` (steps in time, rows, columns, in tokens), `seconds_per_step`, `kept`
        (places in the grid, row by row, step by step) and `scores` (one for each place, or null);
        `audio`: `tokens`, `seconds_per_token`, `kept` and `scores`.
    """
    survives = np.zeros(len(pool.kinds), dtype=bool)
    survives[indices] = True
    rounded = None if scores is None else np.round(scores.astype(np.float64), SCORE_DIGITS)

    def tokens(medium: int, kind: Kind) -> dict[str, Any]:
        mine = (pool.media == medium) & (pool.kinds == kind)
        return {
            "kept": np.flatnonzero(survives[mine]).tolist(),
            "scores": None if rounded is None else rounded[mine].tolist(),
        }

    described = []
    for number, shape in enumerate(pool.shapes):
        entry: dict[str, Any] = {"type": shape.kind.name.lower()}
        if isinstance(shape, Video | Image):
            time, height, width = shape.grid_thw
            entry["video"] = {
                "grid": [time, height // MERGED, width // MERGED],
                "seconds_per_step": shape.second_per_grid if isinstance(shape, Video) else None,
                **tokens(number, shape.kind),
            }
        count = shape.tokens if isinstance(shape, Audio) else getattr(shape, "audio_tokens", 0)
        if count:
            entry["audio"] = {
                "tokens": count,
                "seconds_per_token": SECONDS_PER_AUDIO_TOKEN,
                **tokens(number, Kind.AUDIO),
            }
        described.append(entry)
    return described
