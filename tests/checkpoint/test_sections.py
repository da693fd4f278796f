from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_serve.checkpoint.errors import CheckpointError
from ep_serve.checkpoint.sections import Sections, scaled_sections


@pytest.mark.parametrize(
    ("head_dim", "sections"),
    [(128, (18, 18, 18, 10)), (64, (9, 9, 9, 5)), (256, (36, 36, 36, 20)), (80, (11, 11, 11, 7))],
)
def test_sections_keep_the_proportions_of_the_paper(head_dim: int, sections: Sections) -> None:
    assert scaled_sections(head_dim) == sections


@given(st.integers(1, 4096))
def test_sections_fill_half_a_head_and_none_is_negative(half: int) -> None:
    sections = scaled_sections(2 * half)
    assert sum(sections) == half
    assert min(sections) >= 0


@pytest.mark.parametrize("head_dim", [0, -2, 63])
def test_a_head_that_has_no_halves_is_refused(head_dim: int) -> None:
    with pytest.raises(CheckpointError, match=f"head_dim .* {head_dim}"):
        scaled_sections(head_dim)
