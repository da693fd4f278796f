"""The baseline that keeps evenly spaced tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ep_serve.layout import spread
from ep_serve.sieve.base import Pool, Sieve


class UniformSieve(Sieve):
    """Keeps the middle of each of `k` equal stretches of the pool, in prompt order."""

    name = "uniform"
    reads_text = False
    uses_refiner = False

    def select(self, pool: Pool, k: int) -> Tensor:
        pool.check_budget(k)
        return torch.from_numpy(spread(pool.size, k)).to(pool.hidden.device)
