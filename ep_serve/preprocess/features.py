"""From decoded media to what the towers read, by the checkpoint's own processors.

The engine and the training both come here, so that a model is trained on what it will be served.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from ep_serve.contract.request_options import FRAME_PIXELS, TOKEN_PIXELS

SAMPLE_RATE = 16_000
TEMPORAL_PATCH = 2
TOKEN_SIDE = 28
"""Pixels along the side of one token; frames are resized to multiples of it."""

VIDEO_PIXELS = (128 * TOKEN_PIXELS, FRAME_PIXELS)
"""Least and most pixels of a video frame: the defaults of `Qwen2_5OmniProcessorKwargs`, which win
over the checkpoint's own video processor."""

_AT_ONCE = 128
"""Patches that are normalized together: they stay in a core's cache."""
_RESIZED_AT_ONCE = 2**21
"""Pixels of resized frames that are computed together."""
_FRAMES_AT_ONCE = 1000
"""Frames of a spectrum that are computed together: 10 s."""

Bounds = tuple[int, int]
"""Least and most pixels of a frame or picture."""
Grid = tuple[int, int, int]


def shrunk(height: int, width: int, bounds: Bounds) -> tuple[int, int]:
    """The size to which a video frame is shrunk while it is decoded; small ones stay."""
    smaller = frame_size(height, width, bounds)
    return smaller if smaller[0] * smaller[1] < height * width else (height, width)


def video_patches(
    video_processor: Any,
    frames: NDArray[np.uint8],
    bounds: Bounds,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, Grid]:
    """Patches (n, values) of frames (T, H, W, 3), T even, and their grid.

    Frames are resized and normalized few at a time: the processor as a whole goes through the clip
    in float32 several times, in ten times the memory. The numbers are the same.
    """
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    size = frame_size(frames.shape[1], frames.shape[2], bounds)
    if size != frames.shape[1:3]:
        video = _resized(video_processor, video, size, bounds)
    return _patches_as_they_are(video_processor, video, dtype)


def frame_size(height: int, width: int, bounds: Bounds) -> tuple[int, int]:
    """(height, width) to which frames and pictures of a (height, width) are resized.

    Raises:
        ValueError: a side is more than 200 times as long as the other.
    """
    resized: tuple[int, int] = smart_resize(height, width, TOKEN_SIDE, *bounds)
    return resized


def _resized(
    processor: Any, video: torch.Tensor, size: tuple[int, int], bounds: Bounds
) -> torch.Tensor:
    """Frames (T, 3, H, W) uint8 in another size."""
    resized = torch.empty(*video.shape[:2], *size, dtype=video.dtype)
    at_once = max(1, _RESIZED_AT_ONCE // (size[0] * size[1]))
    for some, target in zip(video.split(at_once), resized.split(at_once), strict=True):
        target.copy_(
            processor.resize(
                some[None], SizeDict(**_size(bounds)), processor.resample, factor=TOKEN_SIDE
            )[0]
        )
    return resized


def _patches_as_they_are(
    processor: Any, video: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, Grid]:
    """Patches (n, values) of frames (T, 3, H, W) whose size is right."""
    side, depth = processor.patch_size, processor.temporal_patch_size
    cut, *grid = processor.patchify(video[None], side, processor.merge_size, depth)
    images = cut[0].view(-1, 3, depth * side, side)
    patches = torch.empty(images.shape, dtype=dtype)
    for some, target in zip(images.split(_AT_ONCE), patches.split(_AT_ONCE), strict=True):
        target.copy_(
            processor.rescale_and_normalize(
                some,
                processor.do_rescale,
                processor.rescale_factor,
                processor.do_normalize,
                processor.image_mean,
                processor.image_std,
            )
        )
    time, rows, columns = grid
    return patches.flatten(1), (time, rows, columns)


def image_patches(
    image_processor: Any, pixels: NDArray[np.uint8], bounds: Bounds
) -> tuple[torch.Tensor, Grid]:
    """Patches (n, values) float32 of a picture (H, W, 3), and their grid."""
    output = image_processor(
        images=[torch.from_numpy(pixels).permute(2, 0, 1)],
        size=_size(bounds),
        return_tensors="pt",
    )
    return _patches(output, "pixel_values", "image_grid_thw")


def log_mel(feature_extractor: Any, waveform: NDArray[np.float32]) -> torch.Tensor:
    """(bins, ceil(samples / hop)) float32 log-mel spectrum of a sound at 16 kHz.

    The feature extractor pads every sound with zeros to its longest length and holds the complex
    spectrum of all of it: 0.8 MB for each second. The numbers are the same here, but for the last
    frame of a sound of exactly the longest length. Only frames of the sound are computed,
    `_FRAMES_AT_ONCE` at a time.
    """
    hop, size = feature_extractor.hop_length, feature_extractor.n_fft
    count, margin = -(-len(waveform) // hop), size // 2
    if not count:
        return torch.empty(feature_extractor.feature_size, 0)
    padded = np.zeros(count * hop + size, dtype=np.float32)
    padded[margin : margin + len(waveform)] = waveform
    padded[:margin] = padded[2 * margin : margin : -1]  # `torch.stft` mirrors the beginning
    samples, window = torch.from_numpy(padded), torch.hann_window(size)
    filters = torch.from_numpy(feature_extractor.mel_filters).to(torch.float32).T
    mel = torch.empty(len(filters), count)
    for frames in mel.split(_FRAMES_AT_ONCE, dim=1):
        some = samples[: (frames.shape[1] - 1) * hop + size]
        spectrum = torch.stft(some, size, hop, window=window, center=False, return_complex=True)
        frames.copy_(filters @ (spectrum.abs() ** 2).contiguous())
        samples = samples[frames.shape[1] * hop :]
    mel.clamp_(min=1e-10).log10_()
    torch.maximum(mel, mel.max() - 8.0, out=mel)
    return mel.add_(4.0).div_(4.0)


def _size(bounds: Bounds) -> dict[str, int]:
    """The bounds as the Hugging Face processors take them."""
    low, high = bounds
    return {"shortest_edge": low, "longest_edge": high}


def _patches(output: Any, values: str, grid: str) -> tuple[torch.Tensor, Grid]:
    time, height, width = (int(n) for n in output[grid][0])
    return output[values], (time, height, width)
