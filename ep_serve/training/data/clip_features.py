"""Process synthetic clips into inputs of the towers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoVideoProcessor

from ep_serve.checkpoint.embedded_text import write_processor_files, write_text_files
from ep_serve.layout import audio_token_count
from ep_serve.preprocess.features import TEMPORAL_PATCH, Grid, log_mel, video_patches
from ep_serve.scenes.scene import Scene, make_scene
from ep_serve.training.data.clips import make_clip
from ep_serve.training.data.labels import Labels, label_tokens
from ep_serve.training.model.architecture import BOUNDS

MERGE = 2


@dataclass(frozen=True, slots=True)
class ClipFeatures:
    """Tower inputs of one clip.

    Attributes:
        scene: The scene that is rendered.
        patches: (n, values) bfloat16, as in the engine.
        grid: Of the patches.
        second_per_grid: Seconds between two pairs of frames.
        mel: (bins, frames) bfloat16.
        audio_tokens: Number of tokens of the audio tower.
        labels: Targets of its tokens.
    """

    scene: Scene
    patches: Tensor
    grid: Grid
    second_per_grid: float
    mel: Tensor
    audio_tokens: int
    labels: Labels


@dataclass(frozen=True, slots=True)
class FeatureExtractor:
    """Generates a clip for each seed, of a length in seconds from `lengths`."""

    lengths: tuple[int, ...]

    def __call__(self, seeds: Sequence[int]) -> list[ClipFeatures]:
        lengths = self.lengths
        return [extract_features(make_scene(seed, lengths[seed % len(lengths)])) for seed in seeds]


def extract_features(scene: Scene, *, degraded: bool = True) -> ClipFeatures:
    """Render a scene and process it as the engine does."""
    video_processor, feature_extractor = load_processors()
    clip = make_clip(scene, BOUNDS, degraded=degraded)
    patches, grid = video_patches(video_processor, clip.frames, BOUNDS, torch.bfloat16)
    mel = log_mel(feature_extractor, clip.sound)
    tokens = audio_token_count(mel.shape[1])
    return ClipFeatures(
        scene=scene,
        patches=patches,
        grid=grid,
        second_per_grid=TEMPORAL_PATCH / clip.fps,
        mel=mel.bfloat16(),
        audio_tokens=tokens,
        labels=label_tokens(scene, clip, (grid[1] // MERGE, grid[2] // MERGE), tokens),
    )


@cache
def load_processors() -> tuple[Any, Any]:
    """Load the video processor and feature extractor of the embedded checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        write_text_files(Path(folder))
        write_processor_files(Path(folder))
        return (
            AutoVideoProcessor.from_pretrained(folder, local_files_only=True),
            AutoFeatureExtractor.from_pretrained(folder, local_files_only=True),
        )
