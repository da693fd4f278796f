"""Stage two: clips as the tokens that the frozen towers make of them.

The language model is trained on these alone; no tower runs any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ep_serve.training.data.clip_features import MakeFeatures
from ep_serve.training.data.token_clip import TokenClip
from ep_serve.training.loop.towers import Hearing, Seeing
from ep_serve.training.model import architecture


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
