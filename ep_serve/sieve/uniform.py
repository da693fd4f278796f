"""The baseline that keeps evenly spaced tokens."""

from __future__ import annotations

import torch

from ep_serve.layout import spread
from ep_serve.sieve.base import Plan, Pool, Selection, Sieve


class UniformSieve(Sieve):
    """Keeps the middle of each of `k` equal stretches of the pool, in prompt order."""

    name = "uniform"
    reads_text = False
    uses_refiner = False

    def select(self, pool: Pool, plan: Plan) -> Selection:
        pool.check_budget(plan.keep)
        return Selection(torch.from_numpy(spread(pool.size, plan.keep)).to(pool.hidden.device))
