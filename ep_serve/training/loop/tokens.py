"""Encode clips to tokens with the frozen towers (stage two).

The language model is trained on these tokens; the towers do not run again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ep_serve.training.data.clip_features import FeatureExtractor
from ep_serve.training.data.token_clip import TokenClip
from ep_serve.training.loop.towers import AudioClassifier, VisionClassifier
from ep_serve.training.model import architecture


@dataclass(frozen=True, slots=True)
class TokenExtractor:
    """Generates a clip for each seed and encodes it with the towers saved in `towers`."""

    towers: Path
    lengths: tuple[int, ...]

    @torch.inference_mode()
    def __call__(self, seeds: Sequence[int]) -> list[TokenClip]:
        vision, audio = load_towers(self.towers)
        clips = []
        for one in FeatureExtractor(self.lengths)(seeds):
            clips.append(
                TokenClip(
                    scene=one.scene,
                    video=vision.encode([one]).bfloat16().clone(),
                    audio=audio.encode([one]).bfloat16().clone(),
                    grid=one.grid,
                    second_per_grid=one.second_per_grid,
                    labels=one.labels,
                )
            )
        return clips


@cache
def load_towers(path: Path) -> tuple[VisionClassifier, AudioClassifier]:
    """Load the trained towers, rounded to bfloat16 and held in float32."""
    config = architecture.config()
    vision, audio = VisionClassifier(config), AudioClassifier(config)
    saved = torch.load(path, weights_only=True)
    for module, name in ((vision, "vision"), (audio, "audio")):
        rounded = {key: value.bfloat16().float() for key, value in saved[name].items()}
        module.load_state_dict(rounded)
        module.eval()
    return vision, audio
