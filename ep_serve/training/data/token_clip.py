"""A clip encoded by the frozen towers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ep_serve.preprocess.features import Grid
from ep_serve.scenes.scene import Scene
from ep_serve.training.data.labels import Labels


@dataclass(frozen=True, slots=True)
class TokenClip:
    """The tokens of one clip.

    Attributes:
        scene: The scene of the clip.
        video: (n, D) bfloat16 video tokens.
        audio: (m, D) bfloat16 audio tokens.
        grid: Patches in time, height and width.
        second_per_grid: Seconds between two pairs of frames.
        labels: Targets of the tokens.
    """

    scene: Scene
    video: Tensor
    audio: Tensor
    grid: Grid
    second_per_grid: float
    labels: Labels
