"""Train the towers by classifying each of their tokens (stage one).

The linear classifiers are discarded afterwards. Targets of a video token are the colour, shape and
place in its pair of frames, and whether the shape overlaps the token's square; the target of an
audio token is the sound in its 40 milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniVisionEncoder,
)

from ep_serve.checkpoint.config import parse_config
from ep_serve.training.data.clip_features import MERGE, ClipFeatures
from ep_serve.training.data.labels import CONTENT
from ep_serve.training.loop.run import Run

BATCH = 24
"""Clips."""
TOKEN_RMS = 0.5
"""Root mean square of the tokens that the language model gets."""
VISUAL_ASPECTS = ("colour", "shape", "where")


class VisionClassifier(nn.Module):
    """The vision tower with classifiers of its tokens."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.tower = Qwen2_5OmniVisionEncoder(parse_config(config).thinker_config.vision_config)
        width = config["thinker_config"]["vision_config"]["out_hidden_size"]
        self.heads = nn.ModuleDict({a: nn.Linear(width, CONTENT[a]) for a in VISUAL_ASPECTS})
        self.cover = nn.Linear(width, 1)

    def encode(self, clips: Sequence[ClipFeatures]) -> Tensor:
        """(n, D) tokens of all clips behind each other."""
        patches = torch.cat([clip.patches for clip in clips]).float()
        grids = torch.tensor([clip.grid for clip in clips])
        tokens: Tensor = self.tower(patches, grid_thw=grids).pooler_output
        return tokens

    def forward(self, clips: Sequence[ClipFeatures]) -> tuple[Tensor, dict[str, float]]:
        """The loss, and the accuracy on tokens that show something."""
        tokens = self.encode(clips)
        each = [(c.grid[1] // MERGE) * (c.grid[2] // MERGE) for c in clips]
        truth = {
            a: torch.from_numpy(
                np.concatenate(
                    [np.repeat(c.labels.pairs[a], n) for c, n in zip(clips, each, strict=True)]
                )
            )
            for a in VISUAL_ASPECTS
        }
        covers = torch.from_numpy(np.concatenate([c.labels.covers.ravel() for c in clips]))
        loss = F.binary_cross_entropy_with_logits(self.cover(tokens).squeeze(-1), covers.float())
        figures = {}
        for aspect in VISUAL_ASPECTS:
            part, figures[aspect] = _classify(self.heads[aspect](tokens), truth[aspect])
            loss = loss + part
        return loss, figures | {"loss": loss.item()}


class AudioClassifier(nn.Module):
    """The audio tower with a classifier of its tokens."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.tower = Qwen2_5OmniAudioEncoder(parse_config(config).thinker_config.audio_config)
        width = config["thinker_config"]["audio_config"]["output_dim"]
        self.head = nn.Linear(width, CONTENT["sound"])

    def encode(self, clips: Sequence[ClipFeatures]) -> Tensor:
        """(n, D) tokens of all clips behind each other."""
        mels = torch.cat([clip.mel for clip in clips], dim=1).float()
        lengths = torch.tensor([clip.mel.shape[1] for clip in clips])
        halved = (lengths - 1) // 2 + 1
        tokens: Tensor = self.tower(
            mels, feature_lens=lengths, aftercnn_lens=halved
        ).last_hidden_state
        return tokens

    def forward(self, clips: Sequence[ClipFeatures]) -> tuple[Tensor, dict[str, float]]:
        """The loss, and the accuracy on tokens with a sound."""
        truth = torch.from_numpy(np.concatenate([clip.labels.heard for clip in clips]))
        loss, share = _classify(self.head(self.encode(clips)), truth)
        return loss, {"sound": share, "loss": loss.item()}


def train(
    tower: VisionClassifier | AudioClassifier,
    clips: Sequence[ClipFeatures],
    held_out: Sequence[ClipFeatures],
    folder: Path,
    *,
    steps: int,
    seed: int,
    rate: float = 2e-3,
) -> dict[str, float]:
    """Train a tower; resumes an interrupted training in the same folder.

    Returns:
        The figures on held-out clips.
    """
    run = Run(folder, tower, steps, rate)
    for step in run.steps():
        chosen = np.random.default_rng([seed, step]).choice(len(clips), BATCH, replace=False)
        loss, figures = tower([clips[i] for i in chosen])
        run.update(loss, figures)
    tower.eval()
    with torch.inference_mode():
        batches = [tower(held_out[i : i + BATCH])[1] for i in range(0, len(held_out), BATCH)]
    return {name: sum(b[name] for b in batches) / len(batches) for name in batches[0]}


@torch.inference_mode()
def scale_tokens(tower: VisionClassifier | AudioClassifier, clips: Sequence[ClipFeatures]) -> None:
    """Scale a trained tower's tokens to a root mean square of `TOKEN_RMS`.

    The layers of an untrained language model add little to a token; to large ones they would add
    nothing that counts. The classifiers are not scaled along: they are not used again.
    """
    last = tower.tower.merger.mlp[2] if isinstance(tower, VisionClassifier) else tower.tower.proj
    scale = TOKEN_RMS / tower.encode(clips[:BATCH]).square().mean().sqrt()
    last.weight *= scale
    last.bias *= scale


def _classify(logits: Tensor, truth: Tensor) -> tuple[Tensor, float]:
    """Cross entropy, and the accuracy where the class is not "nothing"."""
    labelled = truth > 0
    right = (logits.argmax(-1) == truth)[labelled].float().mean().item()
    return F.cross_entropy(logits, truth), right
