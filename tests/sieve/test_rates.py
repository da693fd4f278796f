from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_serve.sieve.rates import PUBLISHED_PAIRS, keep_shares

ratios = st.floats(0.001, 1)
counts = st.integers(0, 100_000)


@pytest.mark.parametrize("keep_ratio", PUBLISHED_PAIRS)
def test_the_published_pairs_hold_at_their_share_of_sound(keep_ratio: float) -> None:
    rho_audio, rho_video = PUBLISHED_PAIRS[keep_ratio]
    assert keep_shares(keep_ratio, 200, 2500) == pytest.approx((1 - rho_audio, 1 - rho_video))


@given(keep_ratio=ratios, num_audio=counts, num_video=counts)
def test_the_shares_add_up_to_the_ratio(keep_ratio: float, num_audio: int, num_video: int) -> None:
    audio, video = keep_shares(keep_ratio, num_audio, num_video)
    assert 0 < video <= audio <= 1 or keep_ratio == pytest.approx(1)
    kept = audio * num_audio + video * num_video
    assert kept == pytest.approx(keep_ratio * (num_audio + num_video), rel=1e-9)


@given(st.lists(ratios, min_size=2, max_size=2, unique=True), counts, counts)
def test_both_shares_grow_with_the_ratio(pair: list[float], num_audio: int, num_video: int) -> None:
    low, high = (keep_shares(ratio, num_audio, num_video) for ratio in sorted(pair))
    # Between the two published pairs the odds ratio falls a little, never by that much.
    assert low[0] <= high[0] + 1e-9
    assert low[1] <= high[1] + 1e-9


def test_a_ratio_of_one_keeps_both_whole() -> None:
    assert keep_shares(1.0, 50, 300) == pytest.approx((1, 1))


def test_one_kind_alone_takes_the_ratio() -> None:
    assert keep_shares(0.2, 50, 0)[0] == pytest.approx(0.2)
    assert keep_shares(0.2, 0, 50)[1] == pytest.approx(0.2)
    assert keep_shares(0.2, 0, 0) == (0.2, 0.2)
