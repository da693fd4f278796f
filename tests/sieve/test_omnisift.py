"""OmniSIFT's device side against the same rules, one token at a time."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ep_serve.layout import Layout
from ep_serve.sieve import Budget, Pool, omnisift
from ep_serve.sieve.omnisift import OmniSiftPlan, OmniSiftSieve
from tests.sieve.pools import HIDDEN_SIZE, LAYOUTS, clip_layout, pool_for

quick = settings(deadline=None, max_examples=40)
rhos = st.floats(0, 1)


@cache
def load_sieve() -> OmniSiftSieve:
    torch.manual_seed(0)
    return OmniSiftSieve.for_model(HIDDEN_SIZE).requires_grad_(False)


def one_by_one(pool: Pool, plan: OmniSiftPlan) -> list[int]:
    """The survivors, pair by pair and frame by frame."""
    kept = plan.fixed.tolist()
    for group in plan.pairs.groups:
        for first, second, sound in zip(group.first, group.second, group.sound, strict=True):
            drop = int(len(first) * plan.rho_video)
            states = pool.hidden[first]
            stay = least(first.tolist(), F.cosine_similarity(states, states.mean(0), -1), drop)
            if len(second) == len(first):
                similar = F.cosine_similarity(pool.hidden[second], states, -1)
                stay += least(second.tolist(), similar, drop)
            else:
                stay += second.tolist()
            kept += stay
            if len(sound) <= 1 or not stay:
                kept += sound.tolist()
                continue
            logits = load_sieve().audio_logits(pool.hidden[sound][None], pool.hidden[stay][None])
            kept += least(sound.tolist(), -logits[0], int(len(sound) * plan.rho_audio))
    return sorted(kept)


def least(tokens: list[int], values: torch.Tensor, drop: int) -> list[int]:
    """All but the `drop` tokens of the highest values."""
    order = values.sort(stable=True).indices.tolist()
    return [tokens[i] for i in order[: len(tokens) - drop]]


@quick
@given(layout=LAYOUTS, rho_audio=rhos, rho_video=rhos, seed=st.integers(0, 99))
def test_it_keeps_what_the_rules_keep(
    layout: Layout, rho_audio: float, rho_video: float, seed: int
) -> None:
    pool = pool_for(layout, seed)
    plan = OmniSiftSieve.plan(layout, Budget(rho_audio=rho_audio, rho_video=rho_video))
    kept = load_sieve().select(pool, plan).indices
    assert kept.tolist() == one_by_one(pool, plan)


def test_chunks_do_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = clip_layout(9, 12, 230)
    plan = OmniSiftSieve.plan(layout, Budget())
    whole = load_sieve().select(pool_for(layout), plan).indices
    monkeypatch.setattr(omnisift, "_CHUNK_TOKENS", 30)
    assert torch.equal(load_sieve().select(pool_for(layout), plan).indices, whole)


def test_parameters_are_named_as_in_the_checkpoint() -> None:
    prefixes = {name.split(".")[0] for name in load_sieve().state_dict()}
    assert prefixes == {
        "v_proj",
        "a_proj",
        "v_norm",
        "a_norm",
        "post_attn_norm",
        "cross_attn",
        "score_head",
    }


def test_it_has_4_85_million_parameters_at_7b() -> None:
    with torch.device("meta"):
        sieve = OmniSiftSieve.for_model(3584)
    assert sum(p.numel() for p in sieve.parameters()) == pytest.approx(4.85e6, rel=0.002)
