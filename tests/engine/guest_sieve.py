"""A sieve of another package, that does what the keep ratio of a request tells it to do.

It chooses the first tokens of the pool: what takes the place of a wrong choice is spread evenly.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ep_serve.layout import Layout
from ep_serve.sieve import Budget, Plan, Pool, Selection, Sieve

SLOW_SECONDS = 10.0

_calls: dict[tuple[float, int], int] = {}


@dataclass(frozen=True, eq=False)
class GuestPlan(Plan):
    keep_ratio: float


class GuestSieve(Sieve):
    name = "guest"
    reads_text = False
    uses_refiner = False

    @classmethod
    def plan(cls, layout: Layout, budget: Budget) -> Plan:
        ratio = budget.keep_ratio or 0.5
        keep = {0.91: 0, 0.92: -1, 0.93: layout.num_av + 1}.get(
            ratio, super().plan(layout, Budget(ratio)).keep
        )
        if ratio == 0.94:
            raise KeyError("secret")
        return GuestPlan(keep, ratio)

    def select(self, pool: Pool, plan: Plan) -> Selection:
        assert isinstance(plan, GuestPlan)
        first, ratio = torch.arange(plan.keep), plan.keep_ratio
        call = _calls[ratio, pool.size] = _calls.get((ratio, pool.size), 0) + 1
        if ratio == 0.11 or (ratio == 0.12 and call == 1):
            raise KeyError("secret")
        if ratio == 0.18:
            Path(os.environ["GUEST_MARK"]).touch()
        if ratio in (0.18, 0.19):
            time.sleep(SLOW_SECONDS if ratio == 0.19 else SLOW_SECONDS / 5)
        scores = torch.zeros(pool.size)
        return {
            0.13: lambda: Selection(first[1:]),
            0.14: lambda: Selection(first.flip(0)),
            0.15: lambda: Selection(first + pool.size),
            0.16: lambda: Selection(first, None, scores / 0),
            0.17: lambda: Selection(first, pool.hidden[first].double()),
        }.get(ratio, lambda: Selection(first, None, scores))()
