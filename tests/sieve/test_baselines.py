from __future__ import annotations

import torch

from ep_serve.sieve.base import Plan
from ep_serve.sieve.random_choice import RandomSieve
from ep_serve.sieve.uniform import UniformSieve
from tests.sieve.pools import make_pool


def test_uniform_keeps_the_middle_of_equal_stretches() -> None:
    assert UniformSieve().select(make_pool(10), Plan(2)).indices.tolist() == [2, 7]
    assert UniformSieve().select(make_pool(10), Plan(3)).indices.tolist() == [1, 5, 8]


def test_uniform_gaps_differ_by_one_at_most() -> None:
    gaps = UniformSieve().select(make_pool(1003), Plan(77)).indices.diff()
    assert gaps.max() - gaps.min() <= 1


def test_random_draws_every_stretch_about_equally_often() -> None:
    hits = torch.zeros(10)
    for size in range(500, 600):
        kept = RandomSieve().select(make_pool(size), Plan(50)).indices
        hits += torch.histc(kept.float() / size, bins=10, min=0, max=1)
    # 5000 draws, 500 expected in each tenth with a standard deviation near 20.
    assert (hits - 500).abs().max() < 100


def test_random_draws_differ_between_budgets() -> None:
    pool = make_pool(1000)
    small, large = (RandomSieve().select(pool, Plan(k)).indices for k in (50, 51))
    assert torch.isin(small, large).sum() < 20


def test_random_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    RandomSieve().select(make_pool(100), Plan(10))
    after = torch.rand(1)
    torch.manual_seed(3)
    make_pool(100)
    assert torch.equal(after, torch.rand(1))
