"""The table of angles that the tests of this room share."""

from __future__ import annotations

import torch
from torch import Tensor


def make_cos_sin_cache(
    head_dim: int, positions: int = 256, theta: float = 1e6, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(positions, head_dim), cosines then sines, built as vLLM builds it."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), frequencies)
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
