"""Random weights that are the same on every machine and with every version of torch."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch

SUMMANDS = 4  # of uniform numbers: their sum is close enough to a normal distribution
# The standard deviation of the sum of SUMMANDS numbers drawn from 0 .. 65535.
SPREAD = math.sqrt(SUMMANDS * (65536**2 - 1) / 12)


def random_tensor(name: str, shape: tuple[int, ...], std: float, seed: int) -> torch.Tensor:
    """A float32 tensor of mean 0 and standard deviation `std`, drawn by `name` and `seed` alone.

    torch promises no stable random numbers across versions and processors, so they come from the
    SHAKE-256 hash function.
    """
    count = math.prod(shape)
    raw = hashlib.shake_256(f"{name}/{seed}".encode()).digest(count * SUMMANDS * 2)
    total = np.frombuffer(raw, "<u2").reshape(count, SUMMANDS).sum(axis=1, dtype=np.int64)
    centred = total - SUMMANDS * 65535 // 2
    return torch.from_numpy((centred * (std / SPREAD)).astype(np.float32)).reshape(shape)
