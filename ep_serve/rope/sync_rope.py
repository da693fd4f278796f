"""Sync-RoPE in plain torch: the reference, and the path of every machine without CUDA.

The half-dimension channels of a head are split into four sections, fed by the position rows T, H, W
and T again (EchoingPixels). Everything else is ordinary rotary embedding in neox style (channel c
is paired with channel c + head_dim / 2), with the arithmetic of vLLM's
`MRotaryEmbedding.forward_native`: cosines and sines are rounded to the dtype of query and key, and
so is every product and sum.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Border = tuple[int, int, int]
"""(first channel, one past the last channel, position row) of one section."""

_SECTION_ROWS = (0, 1, 2, 0)


def channel_rows(sections: Sequence[int]) -> tuple[Border, ...]:
    """Where each section starts and ends, and which position row (0 T, 1 H, 2 W) feeds it.

    Call it once, when the model is built: a forward pass that computed borders would break
    `torch.compile`.

    Args:
        sections: widths of the four sections in half-dimension channels; they sum to head_dim / 2,
            for example (18, 18, 18, 10) for a head of 128.

    Raises:
        ValueError: there are not exactly four widths, or one is negative, or all are 0.
    """
    if len(sections) != len(_SECTION_ROWS):
        raise ValueError(f"sections must be {len(_SECTION_ROWS)} widths, not {list(sections)!r}")
    if min(sections) < 0 or sum(sections) == 0:
        raise ValueError(
            f"sections must not be negative and must not all be 0, got {list(sections)!r}"
        )
    borders = []
    start = 0
    for width, row in zip(sections, _SECTION_ROWS, strict=True):
        borders.append((start, start + int(width), row))
        start += int(width)
    return tuple(borders)


def gather_cos_sin(
    cos_sin_cache: Tensor, positions: Tensor, borders: Sequence[Border]
) -> tuple[Tensor, Tensor]:
    """Look up the cosines and sines of every token, each channel at its own section's position.

    Args:
        cos_sin_cache: (max_position, head_dim) contiguous, the cosines of all half-dimension
            channels followed by their sines, as vLLM's rotary layers keep them.
        positions: (3, n) rows T, H, W; or (n,) where all rows are equal, as in plain text.
        borders: from `channel_rows`.

    Returns:
        cos, sin: (n, head_dim / 2) each, in the dtype of the cache.
    """
    half = cos_sin_cache.shape[-1] // 2
    cos_and_sin = cos_sin_cache.view(-1, 2, half)
    parts = []
    for start, end, row in borders:
        at = positions if positions.ndim == 1 else positions[row]
        parts.append(cos_and_sin[:, :, start:end][at])
    cos, sin = torch.cat(parts, dim=-1).unbind(dim=1)
    return cos, sin


def apply_sync_rope(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Rotate query and key by the angles of their tokens.

    Args:
        query: (n, heads * head_dim).
        key: (n, kv_heads * head_dim), same dtype.
        cos: (n, head_dim / 2), from `gather_cos_sin`.
        sin: (n, head_dim / 2), the same.
        head_dim: channels of one head; all of them rotate.

    Returns:
        query, key: new tensors of the same shapes and dtypes.

    Raises:
        ValueError: `cos` does not cover half a head.
    """
    if 2 * cos.shape[-1] != head_dim:
        raise ValueError(f"cos covers {cos.shape[-1]} channels, but half of head_dim {head_dim}")
    return _rotate(query, cos, sin, head_dim), _rotate(key, cos, sin, head_dim)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    cos = cos.to(x.dtype).unsqueeze(-2)
    sin = sin.to(x.dtype).unsqueeze(-2)
    heads = x.view(x.shape[0], x.shape[1] // head_dim, head_dim)
    first, second = heads.chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.flatten(-2)
