from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoVideoProcessor

from ep_serve.checkpoint.embedded_text import write_processor_files
from ep_serve.checkpoint.features import VIDEO_PIXELS, video_patches


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
