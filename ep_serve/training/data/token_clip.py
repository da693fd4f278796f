"""A clip as the tokens that the frozen towers make of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ep_serve.preprocess.features import Grid
from ep_serve.scenes.scene import Scene
from ep_serve.training.data.labels import Labels


@dataclass(frozen=True, slots=True)
class TokenClip:
    """One clip behind the towers.

    Attributes:
        scene: What happens in it.
        video: (n, D) bfloat16 tokens of the picture.
        audio: (m, D) bfloat16 tokens of the sound.
        grid: Patches in time, height and width.
        second_per_grid: Seconds between two pairs of frames.
        labels: What the tokens show.
    """

    scene: Scene
    video: Tensor
    audio: Tensor
    grid: Grid
    second_per_grid: float
    labels: Labels
