"""How much attention each audio token receives in the last layer of the audio tower.

OmniZip (arXiv 2511.14582, section 3.2) takes the softmax over a whole sound: T x T numbers for T
frames, between frames that never see each other, since Qwen2.5-Omni's audio tower attends within
windows of two seconds. Here the softmax stays within those windows, as it does in the tower itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

_CHUNK_WINDOWS = 32


def windowed_saliency(
    query: Tensor, key: Tensor, borders: Sequence[int], frames: Sequence[int], pool: int = 2
) -> Tensor:
    """Attention received by each audio token: averaged over heads, summed over asking frames.

    The frames of a window receive 1 on average, however long it is. The memory this takes beside
    the result is that of a fixed number of windows.

    Args:
        query: (H, T, d) of the tower's last attention layer, of all sounds one after the other.
        key: (H, T, d).
        borders: The tower's windows as cumulative lengths, 0 ... T (its `cu_seqlens`).
        frames: Frames of each sound; they add up to T.
        pool: Frames that the tower averages into one token; a sound's rest is left out.

    Returns:
        (sum of frames // pool,) float32.

    Raises:
        ValueError: `borders` or `frames` do not cover T frames.
    """
    heads, length, _ = query.shape
    if borders[0] != 0 or borders[-1] != length or sum(frames) != length:
        raise ValueError(
            f"borders must run from 0 to {length} and frames add up to it, "
            f"not {borders[0]} to {borders[-1]} and {sum(frames)}"
        )
    received = query.new_empty(length, dtype=torch.float32)
    for places in _windows_by_size(borders, query.device):
        for some in places.split(_CHUNK_WINDOWS):
            attention = _attention(query[:, some], key[:, some])
            received[some] = attention.sum(dim=(0, 2)) / heads
    sounds: tuple[Tensor, ...] = received.split(list(frames))
    tokens = [sound[: len(sound) // pool * pool].view(-1, pool).mean(dim=1) for sound in sounds]
    return torch.cat(tokens)


def _attention(query: Tensor, key: Tensor) -> Tensor:
    """(..., n, n) float32 attention of (..., n, d)."""
    logits: Tensor = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return logits.softmax(dim=-1, dtype=torch.float32)


def _windows_by_size(borders: Sequence[int], device: torch.device) -> list[Tensor]:
    """The frames of all windows, one (w, n) int64 for each size n that occurs."""
    begins: dict[int, list[int]] = {}
    for begin, end in pairwise(borders):
        begins.setdefault(end - begin, []).append(begin)
    return [
        torch.tensor(first, device=device)[:, None] + torch.arange(size, device=device)
        for size, first in begins.items()
    ]
