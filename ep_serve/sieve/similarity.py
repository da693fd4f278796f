"""Cosine similarity in float32, whatever the states' dtype."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def cosine(states: Tensor, others: Tensor) -> Tensor:
    """Compare vectors one to one.

    Only one temporary of their size: `F.cosine_similarity` makes three.

    Args:
        states: (..., D) float32.
        others: (..., D) float32, broadcast against `states`.

    Returns:
        (...,) float32, 0 for a vector of zeros.
    """
    norms: Tensor = states.norm(dim=-1) * others.norm(dim=-1)
    products: Tensor = (states * others).sum(dim=-1)
    return products / norms.clamp(min=1e-12)


def direction(states: Tensor) -> Tensor:
    """Scale vectors (..., D) to length 1, in float32; their products are cosines."""
    return F.normalize(states.float(), dim=-1)
