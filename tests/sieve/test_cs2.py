from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ep_serve.sieve import Plan, cs2
from ep_serve.sieve.cs2 import CS2Sieve
from tests.sieve.pools import HIDDEN_SIZE, make_pool, pool_of


class FixedScores(CS2Sieve):
    """Takes the first channel of a token for its score."""

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden[:, 0]


def make_sieve() -> CS2Sieve:
    torch.manual_seed(0)
    return CS2Sieve(HIDDEN_SIZE).requires_grad_(False)


def test_parameters_are_named_as_in_the_checkpoint() -> None:
    assert list(make_sieve().state_dict()) == [
        "ln.weight",
        "score_head.0.weight",
        "score_head.0.bias",
        "score_head.2.weight",
        "score_head.2.bias",
    ]


def test_a_score_follows_the_formula_of_the_paper() -> None:
    sieve, hidden = make_sieve().double(), make_pool(50).hidden
    sieve.ln.weight.uniform_(0.5, 2)
    w = sieve.state_dict()
    exact = hidden.double()
    normed = exact / (exact.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w["ln.weight"]
    inner = normed @ w["score_head.0.weight"].T + w["score_head.0.bias"]
    want = F.silu(inner) @ w["score_head.2.weight"][0] + w["score_head.2.bias"]
    torch.testing.assert_close(sieve.float().scores(hidden), want.float(), rtol=0, atol=1e-5)


@given(size=st.integers(0, 60), chunk=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_scores_do_not_depend_on_the_chunks(size: int, chunk: int, seed: int) -> None:
    sieve, hidden = make_sieve(), make_pool(size, seed).hidden
    with pytest.MonkeyPatch.context() as patch:
        whole = sieve.scores(hidden)
        patch.setattr(cs2, "_CHUNK_TOKENS", chunk)
        chunked = sieve.scores(hidden)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-6)


def test_scores_of_half_precision_weights_are_not_rounded_to_ties() -> None:
    scores = make_sieve().bfloat16().scores(make_pool(1000).hidden.bfloat16())
    assert scores.dtype == torch.float32
    assert torch.unique(scores).numel() > 990


def test_the_best_scores_survive() -> None:
    hidden = torch.tensor([[1.0], [5.0], [-2.0], [4.0], [3.0]])
    assert FixedScores(1).select(pool_of(hidden), Plan(3)).indices.tolist() == [1, 3, 4]


@given(scores=st.lists(st.integers(-2, 2), min_size=1, max_size=200), data=st.data())
def test_equal_scores_fall_to_the_lower_index(scores: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(scores)))
    pool = pool_of(torch.tensor(scores, dtype=torch.float32)[:, None])
    best_first = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert FixedScores(1).select(pool, Plan(k)).indices.tolist() == sorted(best_first[:k])


def test_a_pool_of_equal_scores_keeps_its_beginning() -> None:
    kept = FixedScores(1).select(pool_of(torch.zeros(20_000, 1)), Plan(1000)).indices
    assert torch.equal(kept, torch.arange(1000))


def test_scores_too_far_apart_for_a_softmax_still_rank() -> None:
    hidden = torch.tensor([[0.0], [-500.0], [-400.0], [-300.0]])
    assert FixedScores(1).select(pool_of(hidden), Plan(3)).indices.tolist() == [0, 2, 3]
