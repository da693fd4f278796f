from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_serve.media import SamplingRule
from ep_serve.media.sampling import choose_frames, count_frames

RULE = SamplingRule()


@pytest.mark.parametrize(
    ("total", "rate", "count"),
    [
        (32, 8.0, 8),
        (60, 10.0, 12),
        (24, 8.0, 6),
        (90, 30.0, 6),
        (30, 30.0, 4),  # one second would give two; the least is four
        (54_000, 30.0, 768),
        (5, 25.0, 4),
        (3, 25.0, 2),
        (2, 25.0, 2),
        (1, 25.0, 2),
    ],
)
def test_about_two_frames_a_second_are_kept(total: int, rate: float, count: int) -> None:
    assert count_frames(total, rate, RULE) == count


def test_an_odd_minimum_is_rounded_up_to_whole_patches() -> None:
    assert count_frames(300, 30.0, SamplingRule(fps=0.1, min_frames=5)) == 6


@given(
    st.integers(1, 100_000),
    st.floats(0.5, 240),
    st.floats(0.1, 60),
    st.integers(1, 64),
    st.integers(64, 2000),
)
def test_the_number_of_frames_is_even_and_within_its_bounds(
    total: int, rate: float, fps: float, least: int, most: int
) -> None:
    count = count_frames(total, rate, SamplingRule(fps, least, most))
    assert count % 2 == 0
    assert 2 <= count <= max(2, min(total, most))


@given(st.integers(2, 20_000), st.floats(1, 120))
def test_indices_ascend_from_the_first_frame_to_the_last(total: int, rate: float) -> None:
    choice = choose_frames(total, rate, RULE)
    assert choice.indices[0] == 0
    assert choice.indices[-1] == total - 1
    assert (np.diff(choice.indices) >= 0).all()


@given(st.integers(2, 5000), st.sampled_from([8, 24, 25, 30, 60]))
def test_frames_at_a_constant_rate_are_chosen_by_index(total: int, rate: int) -> None:
    milliseconds = np.round(np.arange(total) * 1000 / rate).astype(np.int64)
    by_time = choose_frames(total, rate, RULE, milliseconds)
    by_index = choose_frames(total, rate, RULE)
    np.testing.assert_array_equal(by_time.indices, by_index.indices)
    assert by_time.fps == by_index.fps


def test_frames_at_a_variable_rate_are_chosen_by_what_is_on_screen() -> None:
    times = np.array([0, 1, 2, 3, 50, 99, 100])
    choice = choose_frames(7, 0.7, SamplingRule(min_frames=6), times)
    assert choice.indices.tolist() == [0, 3, 3, 4, 4, 6]  # at 0, 20, 40, 60, 80 and 100


def test_a_single_frame_is_shown_twice() -> None:
    choice = choose_frames(1, 25.0, RULE)
    assert choice.indices.tolist() == [0, 0]
    assert choice.fps == RULE.fps


def test_the_rate_is_that_of_the_frames_kept() -> None:
    assert choose_frames(54_000, 30.0, RULE).fps == pytest.approx(768 / 1800)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"fps": 0.0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"min_frames": 0}, "min_frames"),
        ({"max_frames": 3}, "max_frames"),
        ({"min_frames": 1, "max_frames": 1}, "max_frames"),
    ],
)
def test_an_impossible_rule_names_its_field(fields: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        SamplingRule(**fields)  # type: ignore[arg-type]
