from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_serve.sieve.ranking import indices_of, rank_within


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(0, 5)), max_size=80))
def test_ranks_are_those_within_the_segment(tokens: list[tuple[int, int]]) -> None:
    scores = torch.tensor([float(score) for score, _ in tokens])
    segments = torch.tensor([segment for _, segment in tokens], dtype=torch.int64)
    want = [
        sum((-s, j) < (-score, i) for j, (s, other) in enumerate(tokens) if other == segment)
        for i, (score, segment) in enumerate(tokens)
    ]
    assert rank_within(scores, segments).tolist() == want


@given(st.lists(st.booleans(), max_size=50))
def test_indices_are_those_of_true_values(mask: list[bool]) -> None:
    want = [i for i, value in enumerate(mask) if value]
    assert indices_of(torch.tensor(mask, dtype=torch.bool), len(want)).tolist() == want
