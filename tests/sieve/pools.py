"""Pools and layouts of a given size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ep_serve.layout import Kind, Layout
from ep_serve.sieve import Pool

HIDDEN_SIZE = 16


def make_pool(size: int, seed: int = 0) -> Pool:
    """A pool of video tokens with random states."""
    return pool_of(torch.randn(size, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed)))


def pool_of(hidden: Tensor) -> Pool:
    """A pool of video tokens with these states."""
    size = len(hidden)
    return Pool(
        hidden=hidden,
        kinds=torch.full((size,), Kind.VIDEO, dtype=torch.int8),
        positions=torch.arange(size).expand(3, -1),
        media=torch.zeros(size, dtype=torch.int32),
    )


def make_layout(num_av: int) -> Layout:
    """A prompt of three text tokens and then `num_av` video tokens."""
    length = 3 + num_av
    is_av = np.arange(length) >= 3
    return Layout(
        token_ids=np.zeros(length, dtype=np.int64),
        kinds=np.where(is_av, Kind.VIDEO, Kind.TEXT).astype(np.int8),
        media=np.where(is_av, 0, -1).astype(np.int32),
        positions=np.tile(np.arange(length, dtype=np.int64), (3, 1)),
    )
