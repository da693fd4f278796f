"""Choosing the best tokens of many segments at once."""

from __future__ import annotations

import torch
from torch import Tensor


def rank_within(scores: Tensor, segments: Tensor) -> Tensor:
    """Rank each token among those of its segment: 0 for the highest score, ties by lower index.

    Two stable sorts, whatever the number and the sizes of the segments.

    Args:
        scores: (n,) floating, no NaN.
        segments: (n,) int64, the segment of each token, from 0, in any order.

    Returns:
        (n,) int64.
    """
    best_first = scores.sort(descending=True, stable=True).indices
    order = best_first[segments[best_first].sort(stable=True).indices]
    sorted_segments = segments[order]
    # Where a token's segment begins in the sorted order.
    begins = torch.searchsorted(sorted_segments, sorted_segments)
    ranks = torch.arange(len(scores), device=scores.device) - begins
    return torch.empty_like(ranks).scatter_(0, order, ranks)


def indices_of(mask: Tensor, size: int) -> Tensor:
    """Indices of the `size` true values of (n,) bool, ascending, without waiting for the device."""
    return torch.nonzero_static(mask, size=size).squeeze(1)
