"""No reduction: what every other sieve is compared with."""

from __future__ import annotations

import torch

from ep_serve.layout import Layout
from ep_serve.sieve.base import Budget, Plan, Pool, Selection, Sieve


class KeepAllSieve(Sieve):
    """Keeps the whole pool, whatever is asked for."""

    name = "none"
    reads_text = False
    uses_refiner = False

    @classmethod
    def plan(cls, layout: Layout, budget: Budget) -> Plan:
        return Plan(layout.num_av)

    def select(self, pool: Pool, plan: Plan) -> Selection:
        return Selection(torch.arange(pool.size, device=pool.hidden.device))
