"""What holds for every sieve, whatever it picks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_serve.layout import keep_count
from ep_serve.sieve import Sieve, get_sieve, known_sieves
from tests.sieve.pools import HIDDEN_SIZE, make_layout, make_pool

NAMES = known_sieves()
sizes = st.integers(0, 300)
ratios = st.floats(0, 1, exclude_min=True)


def build(name: str) -> Sieve:
    torch.manual_seed(0)
    return get_sieve(name).for_model(HIDDEN_SIZE)


@pytest.mark.parametrize("name", NAMES)
@given(size=sizes, keep_ratio=ratios)
def test_it_keeps_its_budget_in_prompt_order(name: str, size: int, keep_ratio: float) -> None:
    sieve, pool = build(name), make_pool(size)
    k = sieve.budget(make_layout(size), keep_ratio)
    kept = sieve.select(pool, k)
    assert kept.dtype == torch.int64
    assert kept.shape == (k,)
    assert (kept.diff() > 0).all()
    assert ((kept >= 0) & (kept < size)).all()


@pytest.mark.parametrize("name", NAMES)
@given(size=sizes, keep_ratio=ratios)
def test_it_answers_the_same_again(name: str, size: int, keep_ratio: float) -> None:
    k = keep_count(size, keep_ratio)
    first = build(name).select(make_pool(size), k)
    torch.manual_seed(size)  # as after other requests
    again = build(name).select(make_pool(size), k)
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", NAMES)
@given(size=sizes)
def test_a_keep_ratio_of_one_keeps_all(name: str, size: int) -> None:
    sieve = build(name)
    kept = sieve.select(make_pool(size), sieve.budget(make_layout(size), 1.0))
    assert torch.equal(kept, torch.arange(size))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [-1, 11])
def test_a_budget_outside_the_pool_is_refused(name: str, k: int) -> None:
    with pytest.raises(ValueError, match=f"between 0 and the pool's size 10, not {k}"):
        build(name).select(make_pool(10), k)


@pytest.mark.parametrize("name", NAMES)
def test_the_budget_is_known_without_building_the_sieve(name: str) -> None:
    assert get_sieve(name).budget(make_layout(100), 0.07) == 8
    assert get_sieve(name).budget(make_layout(0), 0.07) == 0


@pytest.mark.parametrize("name", NAMES)
def test_it_knows_its_own_name(name: str) -> None:
    assert get_sieve(name).name == name
