"""The baseline that keeps tokens at random."""

from __future__ import annotations

import torch

from ep_serve.sieve.base import Plan, Pool, Selection, Sieve

_SEED = 2025


class RandomSieve(Sieve):
    """Keeps a uniformly drawn subset.

    The draw depends on nothing but the size of the pool and `k`, and is made on the CPU: all ranks
    of a tensor-parallel model and all repeats of a request have to agree.
    """

    name = "random"
    reads_text = False
    uses_refiner = False

    def select(self, pool: Pool, plan: Plan) -> Selection:
        pool.check_budget(k := plan.keep)
        # A pool and a budget are far below 2**20 tokens, so no two pairs share a seed.
        generator = torch.Generator().manual_seed((_SEED << 40) ^ (pool.size << 20) ^ k)
        drawn = torch.randperm(pool.size, generator=generator)[:k]
        return Selection(drawn.sort().values.to(pool.hidden.device))
