from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoVideoProcessor, WhisperFeatureExtractor

from ep_serve.checkpoint.embedded_text import write_processor_files
from ep_serve.preprocess.features import SAMPLE_RATE, VIDEO_PIXELS, log_mel, video_patches
from tests import memory


@pytest.fixture(scope="module")
def video_processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("processor")
    write_processor_files(folder)
    return AutoVideoProcessor.from_pretrained(folder, local_files_only=True)


@pytest.mark.parametrize("size", [(336, 336), (364, 448), (100, 90), (280, 720)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_those_of_the_processor(
    video_processor: Any, size: tuple[int, int], dtype: torch.dtype
) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (4, *size, 3), dtype=np.uint8)
    low, high = VIDEO_PIXELS
    reference = video_processor(
        videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
        size={"shortest_edge": low, "longest_edge": high},
        do_sample_frames=False,
        return_tensors="pt",
    )
    patches, grid = video_patches(video_processor, frames, VIDEO_PIXELS, dtype)
    assert torch.equal(patches, reference["pixel_values_videos"].to(dtype))
    assert list(grid) == reference["video_grid_thw"][0].tolist()


@pytest.fixture(scope="module")
def feature_extractor() -> Any:
    return WhisperFeatureExtractor(feature_size=128)


@pytest.mark.parametrize("samples", [1, 160, 161, 399, 41_234, 35 * SAMPLE_RATE + 17])
def test_a_spectrum_is_that_of_the_feature_extractor(feature_extractor: Any, samples: int) -> None:
    noise = np.random.default_rng(samples).standard_normal(samples).astype(np.float32)
    noise[samples // 2 :] *= 1e-6  # what is much softer than the loudest is cut off
    (reference,) = feature_extractor(
        np.pad(noise, (0, -samples % 160 + 400)),  # a window: no frame reaches further
        sampling_rate=SAMPLE_RATE,
        padding=False,
        truncation=False,
        return_tensors="pt",
    )["input_features"]
    mel = log_mel(feature_extractor, noise)
    assert mel.shape == (128, -(-samples // 160))
    assert torch.equal(mel, reference[:, : mel.shape[1]])


def test_no_sound_has_an_empty_spectrum(feature_extractor: Any) -> None:
    assert log_mel(feature_extractor, np.empty(0, np.float32)).shape == (128, 0)


def test_a_spectrum_takes_little_more_memory_than_it_has(feature_extractor: Any) -> None:
    sound = np.ones(600 * SAMPLE_RATE, np.float32)
    log_mel(feature_extractor, sound[:SAMPLE_RATE])
    before = memory.resident()
    memory.reset_peak()
    mel = log_mel(feature_extractor, sound)
    assert memory.peak() - before < sound.nbytes + mel.nbytes + (64 << 20)
