"""Stage one: the towers learn to tell what each of their tokens shows.

Every token is classified by linear layers that are thrown away afterwards. A picture's token tells
the colour, shape and place of the pair of frames it belongs to, and whether the shape reaches into
its own square; a token of sound tells what is heard in its 40 milliseconds.
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
from ep_serve.training.data.clip_features import MERGE, Features
from ep_serve.training.data.labels import CONTENT
from ep_serve.training.loop.run import Run

BATCH = 24
"""Clips."""
SIZE = 0.5
"""Of the tokens that the language model gets: their root mean square."""
LOOKS = ("colour", "shape", "where")


class Seeing(nn.Module):
    """The vision tower and what reads its tokens during this stage."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.tower = Qwen2_5OmniVisionEncoder(parse_config(config).thinker_config.vision_config)
        width = config["thinker_config"]["vision_config"]["out_hidden_size"]
        self.heads = nn.ModuleDict({a: nn.Linear(width, CONTENT[a]) for a in LOOKS})
        self.cover = nn.Linear(width, 1)

    def encode(self, clips: Sequence[Features]) -> Tensor:
        """(n, D) tokens of all clips behind each other."""
        patches = torch.cat([clip.patches for clip in clips]).float()
        grids = torch.tensor([clip.grid for clip in clips])
        tokens: Tensor = self.tower(patches, grid_thw=grids).pooler_output
        return tokens

    def forward(self, clips: Sequence[Features]) -> tuple[Tensor, dict[str, float]]:
        """The loss, and the share of tokens that are told right where something is shown."""
        tokens = self.encode(clips)
        each = [(c.grid[1] // MERGE) * (c.grid[2] // MERGE) for c in clips]
        truth = {
            a: torch.from_numpy(
                np.concatenate(
                    [np.repeat(c.labels.pairs[a], n) for c, n in zip(clips, each, strict=True)]
                )
            )
            for a in LOOKS
        }
        covers = torch.from_numpy(np.concatenate([c.labels.covers.ravel() for c in clips]))
        loss = F.binary_cross_entropy_with_logits(self.cover(tokens).squeeze(-1), covers.float())
        figures = {}
        for aspect in LOOKS:
            part, figures[aspect] = _told(self.heads[aspect](tokens), truth[aspect])
            loss = loss + part
        return loss, figures | {"loss": loss.item()}


class Hearing(nn.Module):
    """The audio tower and what reads its tokens during this stage."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.tower = Qwen2_5OmniAudioEncoder(parse_config(config).thinker_config.audio_config)
        width = config["thinker_config"]["audio_config"]["output_dim"]
        self.head = nn.Linear(width, CONTENT["sound"])

    def encode(self, clips: Sequence[Features]) -> Tensor:
        """(n, D) tokens of all clips behind each other."""
        mels = torch.cat([clip.mel for clip in clips], dim=1).float()
        lengths = torch.tensor([clip.mel.shape[1] for clip in clips])
        halved = (lengths - 1) // 2 + 1
        tokens: Tensor = self.tower(
            mels, feature_lens=lengths, aftercnn_lens=halved
        ).last_hidden_state
        return tokens

    def forward(self, clips: Sequence[Features]) -> tuple[Tensor, dict[str, float]]:
        """The loss, and the share of tokens that are told right where something is heard."""
        truth = torch.from_numpy(np.concatenate([clip.labels.heard for clip in clips]))
        loss, share = _told(self.head(self.encode(clips)), truth)
        return loss, {"sound": share, "loss": loss.item()}


def train(
    tower: Seeing | Hearing,
    clips: Sequence[Features],
    held_out: Sequence[Features],
    folder: Path,
    *,
    steps: int,
    seed: int,
    rate: float = 2e-3,
) -> dict[str, float]:
    """Train a tower; go on where an earlier call in the same folder stopped.

    Returns:
        The figures on clips it has not seen.
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
def set_size(tower: Seeing | Hearing, clips: Sequence[Features]) -> None:
    """Scale a trained tower's tokens to a root mean square of `SIZE`.

    The layers of an untrained language model add little to a token; to large ones they would add
    nothing that counts. What reads the tokens in this stage is not scaled along, it is done with.
    """
    last = tower.tower.merger.mlp[2] if isinstance(tower, Seeing) else tower.tower.proj
    scale = SIZE / tower.encode(clips[:BATCH]).square().mean().sqrt()
    last.weight *= scale
    last.bias *= scale


def _told(logits: Tensor, truth: Tensor) -> tuple[Tensor, float]:
    """Cross entropy, and the share told right where there is something to tell."""
    something = truth > 0
    right = (logits.argmax(-1) == truth)[something].float().mean().item()
    return F.cross_entropy(logits, truth), right
