"""The model that is trained computes what the authors' own implementation does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ep_serve.layout import spread
from ep_serve.training.model.batch import Batch, Example, collate
from ep_serve.training.model.thinker import Thinker
from ep_serve.training.model.weights import load_thinker
from tests.goldens import CASES, CHECKPOINT, load_case, needs_goldens
from tests.layout.test_goldens import layout_of

pytestmark = needs_goldens

TOLERANCE = 1e-3
"""What the goldens' README allows another order of summation."""
MEDIA_CASES = [name for name in CASES if name != "text_only"]


@pytest.fixture(scope="module")
def thinker() -> Thinker:
    return load_thinker(CHECKPOINT).eval()


def example(name: str) -> tuple[Example, float]:
    case, tensors = load_case(name)
    layout = layout_of(name)
    av = tensors["llm.inputs_embeds"][torch.from_numpy(layout.is_av)]
    return Example(layout, av, tensors["out.generated_ids"].tolist()), case["compression_ratio"]


def batch_of(*cases: str) -> Batch:
    examples, ratios = zip(*map(example, cases), strict=True)
    return collate(examples, ratios)


@pytest.mark.parametrize("name", MEDIA_CASES)
@torch.inference_mode()
def test_a_prompt_is_refined_and_reduced_as_the_authors_do(thinker: Thinker, name: str) -> None:
    _, tensors = load_case(name)
    output = thinker(batch_of(name))
    torch.testing.assert_close(
        output.refined[0], tensors["refine.hidden"], atol=TOLERANCE, rtol=TOLERANCE
    )
    assert torch.equal(output.kept[0].nonzero().squeeze(1), tensors["select.keep_indices"])


@pytest.mark.parametrize("name", MEDIA_CASES)
@torch.inference_mode()
def test_the_logits_of_an_answer_are_the_authors(thinker: Thinker, name: str) -> None:
    _, tensors = load_case(name)
    output = thinker(batch_of(name))
    torch.testing.assert_close(output.logits, tensors["out.step_logits"], atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_prompts_in_one_batch_are_independent(thinker: Thinker) -> None:
    output = thinker(batch_of(*MEDIA_CASES))
    expected = [load_case(name)[1]["out.step_logits"] for name in MEDIA_CASES]
    torch.testing.assert_close(output.logits, torch.cat(expected), atol=TOLERANCE, rtol=0)


def test_gradients_reach_the_score_head_through_the_choice(thinker: Thinker) -> None:
    output = thinker(batch_of("aiv_a_r010"))
    thinker.zero_grad()
    output.logits.logsumexp(-1).sum().backward()
    gradient = thinker.get_parameter("model.compressor.score_head.0.weight").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


@torch.inference_mode()
def test_activation_checkpointing_does_not_change_the_output(thinker: Thinker) -> None:
    checkpointed = load_thinker(CHECKPOINT, checkpoint_activations=True)
    batch = batch_of("aiv_a_r010")
    assert torch.equal(checkpointed(batch).logits, thinker(batch).logits)


@torch.inference_mode()
def test_a_sieve_without_weights_may_select_instead(thinker: Thinker) -> None:
    uniform = load_thinker(CHECKPOINT, sieve="uniform")
    batch = batch_of("aiv_a_r010", "aiv_b_r020")
    output = uniform(batch)
    for row, keep in enumerate(batch.keep.tolist()):
        is_av = batch.is_av[row]
        kept = output.kept[row][is_av].nonzero().squeeze(1)
        np.testing.assert_array_equal(kept, spread(int(is_av.sum()), keep))


@torch.inference_mode()
def test_with_the_bypass_closed_the_text_is_not_refined(thinker: Thinker) -> None:
    closed = load_thinker(CHECKPOINT, close_bypass=True)
    batch = batch_of("aiv_a_r010")
    open_output, closed_output = thinker(batch), closed(batch)
    assert torch.equal(open_output.kept, closed_output.kept)
    assert not torch.allclose(open_output.logits, closed_output.logits, atol=0.1)
