"""The refiner and CS2 against the numbers of the official implementation."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ep_serve.layout import keep_count
from ep_serve.sieve import Pool
from ep_serve.sieve.base import Plan
from ep_serve.sieve.cs2 import CS2Sieve
from tests.goldens import CASES, CHECKPOINT, load_case, needs_goldens
from tests.reference_refiner import ReferenceRefiner

pytestmark = needs_goldens

# The numbers are about 12 in size; another summation order moves them by less than 1e-5.
TOLERANCE = 1e-4
MEDIA_CASES = [case for case in CASES if case != "text_only"]

load_refiner = cache(ReferenceRefiner.from_checkpoint)


@cache
def load_sieve() -> CS2Sieve:
    prefix = "thinker.model.compressor."
    weights = load_file(CHECKPOINT / "model.safetensors")
    weights = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    sieve = CS2Sieve.for_model(weights["ln.weight"].numel())
    sieve.load_state_dict(weights)
    return sieve.requires_grad_(False)


def refine(tensors: dict[str, Tensor]) -> Tensor:
    refined: Tensor = load_refiner(CHECKPOINT)(
        tensors["llm.inputs_embeds"], tensors["rope.position_ids"][:3]
    )
    return refined


@pytest.mark.parametrize("case", MEDIA_CASES)
def test_refined_states_equal_the_official_ones(case: str) -> None:
    tensors = load_case(case)[1]
    torch.testing.assert_close(refine(tensors), tensors["refine.hidden"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", MEDIA_CASES)
def test_scores_equal_the_official_ones(case: str) -> None:
    tensors = load_case(case)[1]
    scores = load_sieve().scores(tensors["refine.hidden"][tensors["score.av_indices"]])
    torch.testing.assert_close(scores, tensors["score.av_scores"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", MEDIA_CASES)
def test_from_embeddings_the_same_tokens_survive(case: str) -> None:
    facts, tensors = load_case(case)
    in_prompt = tensors["score.av_indices"]
    size = len(in_prompt)
    pool = Pool(
        hidden=refine(tensors)[in_prompt],
        kinds=torch.ones(size, dtype=torch.int8),
        positions=tensors["rope.position_ids"][:3, in_prompt],
        media=torch.zeros(size, dtype=torch.int32),
    )
    kept = load_sieve().select(pool, Plan(keep_count(size, facts["compression_ratio"]))).indices
    assert torch.equal(in_prompt[kept], tensors["select.kept_av_indices"])
