"""OmniSIFT against the numbers of the official implementation."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ep_serve.layout import Kind, Layout
from ep_serve.sieve import Budget, Pool
from ep_serve.sieve.frame_pairs import PairGroup
from ep_serve.sieve.omnisift import OmniSiftSieve
from tests.goldens import OMNISIFT, load_case, needs_goldens
from tests.layout.test_goldens import layout_of
from tests.sieve.pools import as_one_clip

pytestmark = needs_goldens

MANIFEST: list[dict[str, Any]] = (
    json.loads((OMNISIFT / "manifest.json").read_text()) if OMNISIFT.is_dir() else []
)
WITH_SOUND = [facts for facts in MANIFEST if facts["n_audio"]]
ONE_CLIP = [facts for facts in MANIFEST if "_then_" not in facts["source"]]
TOLERANCE = 1e-5


def name_of(facts: dict[str, Any]) -> str:
    return str(facts["case"])


all_cases = pytest.mark.parametrize("facts", MANIFEST, ids=name_of)


@cache
def load_sieve() -> OmniSiftSieve:
    prefix = "thinker.compressor."
    weights = load_file(OMNISIFT / "selector.safetensors")
    weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    sieve = OmniSiftSieve.for_model(weights["v_proj.weight"].shape[1])
    sieve.load_state_dict(weights)
    return sieve.requires_grad_(False)


def pool_of_case(source: str) -> Pool:
    layout, tensors = layout_of(source), load_case(source)[1]
    is_av = torch.from_numpy(layout.is_av)
    return Pool(
        hidden=tensors["llm.inputs_embeds"][is_av],
        kinds=torch.from_numpy(layout.kinds)[is_av],
        positions=tensors["rope.position_ids"][:3, is_av],
        media=torch.from_numpy(layout.media)[is_av],
    )


def keep_mask(facts: dict[str, Any], layout: Layout) -> torch.Tensor:
    """(L,) bool, the prompt positions that stay."""
    budget = Budget(rho_audio=facts["rho_audio"], rho_video=facts["rho_video"])
    plan = OmniSiftSieve.plan(layout, budget)
    keep = torch.from_numpy(~layout.is_av)
    (av,) = torch.from_numpy(layout.is_av).nonzero(as_tuple=True)
    keep[av[load_sieve().select(pool_of_case(facts["source"]), plan).indices]] = True
    return keep


def test_there_are_32_cases() -> None:
    assert len(MANIFEST) == 32


@all_cases
def test_the_counts_are_known_from_the_layout(facts: dict[str, Any]) -> None:
    layout = layout_of(facts["source"])
    budget = Budget(rho_audio=facts["rho_audio"], rho_video=facts["rho_video"])
    plan = OmniSiftSieve.plan(as_one_clip(layout), budget)
    assert plan.keep == facts["kept_video"] + facts["kept_audio"] + layout.count(Kind.IMAGE)
    assert layout.num_text + plan.keep == facts["L_reduced"]


@all_cases
def test_the_same_tokens_and_positions_survive(facts: dict[str, Any]) -> None:
    golden = load_file(OMNISIFT / "cases" / f"{facts['case']}.safetensors")
    keep = keep_mask(facts, as_one_clip(layout_of(facts["source"])))
    assert torch.equal(keep, golden["keep_mask"])
    assert torch.equal(keep.nonzero().squeeze(1), golden["keep_indices"])
    positions = torch.from_numpy(layout_of(facts["source"]).positions)
    assert torch.equal(positions[:, keep], golden["position_ids"])
    if "embeds" in golden:
        embeds = load_case(facts["source"])[1]["llm.inputs_embeds"][keep]
        torch.testing.assert_close(embeds, golden["embeds"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("facts", ONE_CLIP, ids=name_of)
def test_one_clip_needs_no_straddling(facts: dict[str, Any]) -> None:
    layout = layout_of(facts["source"])
    assert torch.equal(keep_mask(facts, layout), keep_mask(facts, as_one_clip(layout)))


@pytest.mark.parametrize("facts", WITH_SOUND, ids=name_of)
def test_audio_scores_equal_the_official_ones(facts: dict[str, Any]) -> None:
    golden = load_file(OMNISIFT / "cases" / f"{facts['case']}.safetensors")
    budget = Budget(rho_audio=facts["rho_audio"], rho_video=facts["rho_video"])
    plan = OmniSiftSieve.plan(as_one_clip(layout_of(facts["source"])), budget)
    hidden = pool_of_case(facts["source"]).hidden
    scores: dict[int, torch.Tensor] = {}
    for group in plan.pairs.groups:
        scores |= score_pairs(hidden, group, plan.rho_video)
    in_order = [scores[start] for start in sorted(scores)]
    assert [len(s) for s in in_order] == golden["audio_scores_sizes"].tolist()
    torch.testing.assert_close(torch.cat(in_order), golden["audio_scores"], rtol=0, atol=TOLERANCE)


def score_pairs(
    hidden: torch.Tensor, group: PairGroup, rho_video: float
) -> dict[int, torch.Tensor]:
    """Audio scores of each pair, by the pool index of its first token."""
    if group.sound.shape[1] <= 1:
        return {}
    sieve = load_sieve()
    video = sieve.prune(hidden, group, rho_video)
    scores = sieve.audio_logits(hidden[torch.from_numpy(group.sound)], hidden[video]).sigmoid()
    return dict(zip(group.first[:, 0].tolist(), scores, strict=True))
