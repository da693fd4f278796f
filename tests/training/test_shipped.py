"""The model in the repository answers, without an engine: files, towers, thinker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import ep_serve.demo
from ep_serve.checkpoint.check import check
from ep_serve.layout import audio_token_count
from ep_serve.media import MediaLimits, SamplingRule, decode_clip
from ep_serve.preprocess.features import TEMPORAL_PATCH, log_mel, shrunk, video_patches
from ep_serve.scenes.encoding import Encoding, encode
from ep_serve.scenes.scene import make_scene
from ep_serve.training.data.clip_features import load_processors
from ep_serve.training.data.clips import make_clip
from ep_serve.training.data.conversations import FrozenTowers
from ep_serve.training.data.examples import PromptEncoder, collate_labelled
from ep_serve.training.data.labels import label_tokens
from ep_serve.training.data.token_clip import TokenClip
from ep_serve.training.loop.language import QuestionSampler
from ep_serve.training.model import architecture
from ep_serve.training.model.weights import load_thinker

MODEL = Path(ep_serve.demo.__file__).parent / "model"
SEEDS = range(3_000_000, 3_000_016)
"""Of clips that no training has seen."""


def test_it_can_be_served_and_is_small() -> None:
    assert check(MODEL) == []
    assert (MODEL / "model.safetensors").stat().st_size < 12e6


def test_its_shape_is_the_one_that_is_trained(tmp_path: Path) -> None:
    architecture.write_config_files(tmp_path)
    for file in tmp_path.iterdir():
        assert (MODEL / file.name).read_bytes() == file.read_bytes()


@pytest.fixture(scope="module")
def clips() -> list[TokenClip]:
    """Encoded files behind the towers."""
    towers = FrozenTowers(MODEL, torch.float32)
    return [read(towers, seed) for seed in SEEDS]


def read(towers: FrozenTowers, seed: int) -> TokenClip:
    scene = make_scene(seed, 4 + seed % 6)
    video_processor, feature_extractor = load_processors()
    bounds = architecture.BOUNDS
    clip = decode_clip(
        encode(scene, Encoding(fps=12, crf=26)),
        SamplingRule(),
        MediaLimits(),
        size=lambda height, width: shrunk(height, width, bounds),
    )
    assert clip.sound is not None
    patches, grid = video_patches(video_processor, clip.frames, bounds)
    mel = log_mel(feature_extractor, clip.sound)
    tokens = audio_token_count(mel.shape[1])
    drawn = make_clip(scene, bounds)
    return TokenClip(
        scene=scene,
        video=towers.encode_visual(patches, grid),
        audio=towers.encode_audio(mel),
        grid=grid,
        second_per_grid=TEMPORAL_PATCH / clip.fps,
        labels=label_tokens(scene, drawn, (grid[1] // 2, grid[2] // 2), tokens),
    )


@pytest.mark.parametrize("keep_ratio", [1.0, 0.1])
@torch.inference_mode()
def test_it_answers_about_files_it_has_never_seen(
    clips: list[TokenClip], keep_ratio: float
) -> None:
    sampler = QuestionSampler(clips, PromptEncoder(MODEL))
    rng = np.random.default_rng(0)
    asked = [sampler.build_example(clip, rng) for clip in clips for _ in range(3)]
    batch = collate_labelled(asked, [keep_ratio] * len(asked))
    output = load_thinker(MODEL)(batch.batch)
    right = output.logits.argmax(-1) == batch.batch.targets
    answers = right.split(batch.batch.answer_valid.sum(1).tolist())
    assert np.mean([bool(answer.all()) for answer in answers]) >= 0.8  # a guess: 0.3
