from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_serve.layout import keep_count, spread

RATIOS = st.floats(0, 1, exclude_min=True)
POOLS = st.integers(1, 200_000)


def test_the_product_is_a_python_float() -> None:
    assert keep_count(100, 0.07) == 8


def test_an_empty_pool_keeps_nothing() -> None:
    assert keep_count(0, 0.2) == 0


@given(POOLS)
def test_ratio_1_keeps_all(num_av: int) -> None:
    assert keep_count(num_av, 1) == keep_count(num_av, 1.0) == num_av


@given(POOLS, RATIOS)
def test_at_least_one_and_at_most_all_are_kept(num_av: int, ratio: float) -> None:
    assert 1 <= keep_count(num_av, ratio) <= num_av


@given(POOLS, RATIOS, RATIOS)
def test_a_larger_ratio_never_keeps_fewer(num_av: int, one: float, other: float) -> None:
    low, high = sorted([one, other])
    assert keep_count(num_av, low) <= keep_count(num_av, high)


@given(POOLS, POOLS, RATIOS)
def test_a_larger_pool_never_keeps_fewer(one: int, other: int, ratio: float) -> None:
    low, high = sorted([one, other])
    assert keep_count(low, ratio) <= keep_count(high, ratio)


@pytest.mark.parametrize("num_av", [0, 10])
@pytest.mark.parametrize(
    "ratio", [0, 0.0, -0.1, 1.01, math.nan, math.inf, True, False, "0.2", None]
)
def test_an_invalid_ratio_is_refused_by_name_and_value(ratio: Any, num_av: int) -> None:
    with pytest.raises(ValueError, match=f"keep_ratio must be .*, not {re.escape(repr(ratio))}"):
        keep_count(num_av, ratio)


def test_a_negative_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="num_av must be at least 0, not -1"):
        keep_count(-1, 0.2)


@given(POOLS, st.data())
def test_spread_indices_ascend_inside_the_pool(num_av: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(num_av, 2000)))
    indices = spread(num_av, k)
    assert indices.dtype == np.int64
    assert indices.shape == (k,)
    assert indices[0] >= 0
    assert indices[-1] < num_av
    assert (np.diff(indices) > 0).all()


@given(st.integers(1, 300), st.data())
def test_spread_indices_are_the_middles_of_equal_stretches(
    num_av: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, num_av))
    exact = [math.floor((i + Fraction(1, 2)) * num_av / k) for i in range(k)]
    assert spread(num_av, k).tolist() == exact


@given(st.integers(0, 2000))
def test_spreading_all_gives_all(num_av: int) -> None:
    np.testing.assert_array_equal(spread(num_av, num_av), np.arange(num_av))


def test_spreading_none_gives_none() -> None:
    assert spread(5, 0).shape == (0,)


@pytest.mark.parametrize("k", [-1, 6])
def test_spreading_more_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"k must lie between 0 and num_av 5, not {k}"):
        spread(5, k)
