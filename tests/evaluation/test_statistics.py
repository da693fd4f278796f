from __future__ import annotations

import numpy as np
import pytest

from ep_serve.evaluation.statistics import paired_ratio, wilson


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        # Published values: Newcombe 1998 (Statistics in Medicine 17), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0000),
    ],
)
def test_wilsons_interval_is_that_of_the_literature(
    right: int, count: int, low: float, high: float
) -> None:
    found = wilson(right, count)
    assert found.value == right / count
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_more_right_than_asked_is_refused(right: int, count: int) -> None:
    with pytest.raises(ValueError, match="right must be"):
        wilson(right, count)


def sample(clips: int = 60, each: int = 4) -> tuple[list[bool], list[bool], list[str]]:
    rng = np.random.default_rng(1)
    base = rng.random(clips * each) < 0.9
    right = base & (rng.random(clips * each) < 0.95)
    return right.tolist(), base.tolist(), [str(i // each) for i in range(clips * each)]


def test_the_same_seed_draws_the_same_interval() -> None:
    assert paired_ratio(*sample()) == paired_ratio(*sample())
    assert paired_ratio(*sample()) != paired_ratio(*sample(), seed=1)


def test_the_interval_holds_the_ratio() -> None:
    right, base, clips = sample()
    found = paired_ratio(right, base, clips)
    assert found is not None
    assert found.value == sum(right) / sum(base)
    assert 0.85 < found.low < found.value < found.high < 1.0


def test_equal_answers_have_a_ratio_of_exactly_one() -> None:
    right, _, clips = sample()
    found = paired_ratio(right, right, clips)
    assert found is not None
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)


def test_fewer_clips_with_more_questions_are_less_sure() -> None:
    right, base, clips = sample()
    apart = paired_ratio(right, base, [str(i) for i in range(len(right))])
    # Answers in order: clips that are right as a whole, and clips that are wrong as a whole.
    order = np.argsort(right)
    clustered = paired_ratio([right[i] for i in order], [True] * len(right), clips)
    assert apart is not None
    assert clustered is not None
    assert clustered.high - clustered.low > apart.high - apart.low


def test_nothing_is_a_share_of_no_right_answer() -> None:
    assert paired_ratio([True], [False], ["a"]) is None
