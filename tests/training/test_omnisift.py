"""OmniSIFT as it is trained: the choice of the served sieve, and gradients for its selector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ep_serve.checkpoint.config import load_config, text_config
from ep_serve.layout import Layout
from ep_serve.sieve import Budget
from ep_serve.sieve.omnisift import OmniSiftSieve
from ep_serve.training.model.batch import Batch, Example, collate
from ep_serve.training.model.omnisift import select_with_gradient
from ep_serve.training.model.thinker import Thinker
from tests.sieve.pools import HIDDEN_SIZE, clip_layout, pool_for

KEEP_RATIO = 0.3


@pytest.mark.parametrize("keep_ratio", [1.0, KEEP_RATIO, 1e-9])
def test_it_keeps_what_the_served_sieve_keeps(keep_ratio: float) -> None:
    layout = clip_layout(6, 9, 150)
    sieve, pool = OmniSiftSieve(HIDDEN_SIZE), pool_for(layout)
    plan = OmniSiftSieve.plan(layout, Budget(keep_ratio))
    kept, factor = select_with_gradient(sieve, pool, plan)
    assert torch.equal(kept, sieve.select(pool, plan).indices)
    assert torch.equal(factor, torch.ones(pool.size))


@pytest.fixture(scope="module")
def thinker(embedded: Path) -> Thinker:
    torch.manual_seed(0)
    return Thinker(load_config(embedded), sieve="omnisift")


@pytest.fixture(scope="module")
def layouts() -> list[Layout]:
    """A long prompt and a short one, so that one of them is padded."""
    both = [clip_layout(6, 9, 150), clip_layout(3, 9, 75)]
    return [replace(one, token_ids=np.zeros_like(one.token_ids)) for one in both]


@pytest.fixture(scope="module")
def batch(embedded: Path, layouts: list[Layout]) -> Batch:
    width = text_config(load_config(embedded)).hidden_size
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(layout, torch.randn(layout.num_av, width, generator=generator), [1, 2])
        for layout in layouts
    ]
    return collate(examples, [KEEP_RATIO] * len(examples))


def test_a_prompt_is_found_again_in_a_batch(batch: Batch, layouts: list[Layout]) -> None:
    for row, layout in enumerate(layouts):
        again = batch.layout(row)
        for name in ("token_ids", "kinds", "media", "positions"):
            np.testing.assert_array_equal(getattr(again, name), getattr(layout, name))


def test_every_prompt_keeps_as_many_tokens_as_when_it_is_served(
    thinker: Thinker, batch: Batch, layouts: list[Layout]
) -> None:
    kept = (thinker(batch).kept & batch.is_av).sum(1).tolist()
    assert kept == [OmniSiftSieve.plan(layout, Budget(KEEP_RATIO)).keep for layout in layouts]


def test_the_selector_learns_and_the_refiner_is_not_used(thinker: Thinker, batch: Batch) -> None:
    thinker.zero_grad()
    thinker(batch).logits.square().mean().backward()
    assert all(p.grad is None for p in thinker.model.bidir_encoder.parameters())
    assert isinstance(thinker.compressor, OmniSiftSieve)
    gradient = thinker.compressor.v_proj.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_decoder_states_are_at_the_positions_of_their_tokens(
    thinker: Thinker, batch: Batch
) -> None:
    output = thinker(batch)
    assert torch.equal(output.decoded.abs().sum(-1) > 0, output.kept)
