"""Stage two: clips as the tokens that the frozen towers make of them.

The language model is trained on these alone; no tower runs any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ep_serve.checkpoint.features import Grid
from ep_serve.training import architecture
from ep_serve.training.features import MakeFeatures
from ep_serve.training.labels import Labels
from ep_serve.training.scenes import Scene
from ep_serve.training.towers import Hearing, Seeing


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


@dataclass(frozen=True, slots=True)
class MakeTokens:
    """Turns seeds into clips of `lengths` seconds behind the towers saved in `towers`."""

    towers: Path
    lengths: tuple[int, ...]

    @torch.inference_mode()
    def __call__(self, seeds: Sequence[int]) -> list[TokenClip]:
        seeing, hearing = load_towers(self.towers)
        clips = []
        for one in MakeFeatures(self.lengths)(seeds):
            clips.append(
                TokenClip(
                    scene=one.scene,
                    video=seeing.encode([one]).bfloat16().clone(),
                    audio=hearing.encode([one]).bfloat16().clone(),
                    grid=one.grid,
                    second_per_grid=one.second_per_grid,
                    labels=one.labels,
                )
            )
        return clips


@cache
def load_towers(path: Path) -> tuple[Seeing, Hearing]:
    """The towers that `save_towers` wrote, in float32 numbers that bfloat16 can hold."""
    config = architecture.config()
    seeing, hearing = Seeing(config), Hearing(config)
    saved = torch.load(path, weights_only=True)
    for module, name in ((seeing, "seeing"), (hearing, "hearing")):
        rounded = {key: value.bfloat16().float() for key, value in saved[name].items()}
        module.load_state_dict(rounded)
        module.eval()
    return seeing, hearing
