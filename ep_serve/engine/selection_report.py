"""Which tokens of a request survived, for those who asked (`return_selection`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ep_serve.layout import Audio, Image, Kind, Video

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from ep_serve.layout import Medium as Shape

MERGED = 2
"""Patches along each side of one token."""

SECONDS_PER_AUDIO_TOKEN = 0.04
SCORE_DIGITS = 4


@dataclass(frozen=True)
class PoolRecord:
    """A pool of n tokens after selection. Tensors lie on the model's device."""

    kinds: torch.Tensor
    """(n,) int8, see `Kind`."""
    media: torch.Tensor
    """(n,) int32, index of the medium."""
    indices: torch.Tensor
    """(K,) int64 of the survivors."""
    scores: torch.Tensor | None
    """(n,) float32, from a sieve that ranks all tokens of the pool."""

    def as_lists(self) -> dict[str, list[Any] | None]:
        """Plain values, to cross processes."""
        return {
            "kinds": self.kinds.tolist(),
            "media": self.media.tolist(),
            "indices": self.indices.tolist(),
            "scores": None if self.scores is None else self.scores.tolist(),
        }


def describe(shapes: Sequence[Shape], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The survivors medium by medium, as `usage.reduction.selection` gives them.

    Args:
        shapes: the media of the request, in prompt order.
        record: `PoolRecord.as_lists`.

    Returns:
        For each medium its `type` and, as far as it has them:
        `video`: `grid` (steps in time, rows, columns, in tokens), `seconds_per_step`, `kept`
        (places in the grid, row by row, step by step) and `scores` (one for each place, or null);
        `audio`: `tokens`, `seconds_per_token`, `kept` and `scores`.
    """
    kinds, media = np.array(record["kinds"]), np.array(record["media"])
    survives = np.zeros(len(kinds), dtype=bool)
    survives[record["indices"]] = True
    scores = None if record["scores"] is None else np.round(record["scores"], SCORE_DIGITS)

    def tokens(medium: int, kind: Kind) -> dict[str, Any]:
        mine = (media == medium) & (kinds == kind)
        return {
            "kept": np.flatnonzero(survives[mine]).tolist(),
            "scores": None if scores is None else scores[mine].tolist(),
        }

    described = []
    for number, shape in enumerate(shapes):
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
