"""OmniZip's stages against the paper's rules, one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from ep_serve.layout import Audio, Kind, Layout, Video
from ep_serve.sieve import Budget, Pool, omnizip
from ep_serve.sieve.omnizip import (
    OmniZipSieve,
    choose_sound,
    choose_video,
    cluster_scores,
    merged,
    window_shares,
)
from tests.layout.prompts import Prompt
from tests.sieve.pools import HIDDEN_SIZE, clip_layout, lay_out, pool_for

quick = settings(deadline=None, max_examples=40)


def heard_first(layout: Layout, kept: int) -> torch.Tensor:
    """All sound up to some token is kept."""
    return torch.arange(layout.count(Kind.AUDIO)) < kept


def test_the_most_salient_sound_and_every_step_th_anchor_stay() -> None:
    layout = clip_layout(4, 10, 100)
    plan = OmniZipSieve.plan(layout, Budget(rho_audio=0.3))
    saliency = torch.rand(100, generator=torch.Generator().manual_seed(0))
    salient, rest = choose_sound(saliency, plan.sounds)
    assert set(salient.nonzero().flatten().tolist()) == set(saliency.topk(70).indices.tolist())
    (merge,) = plan.sounds.merges
    assert merge.anchors.tolist() == [0, 6, 12, 18, 24]  # 5 % of 100, among the 30 others
    assert sorted([*merge.anchors, *merge.absorbed]) == list(range(len(rest)))


def test_sounds_are_chosen_one_by_one() -> None:
    layout = lay_out(Prompt().add(Audio(40)).add(Audio(60)))
    plan = OmniZipSieve.plan(layout, Budget(rho_audio=0.5))
    salient, _ = choose_sound(torch.arange(100.0), plan.sounds)
    assert salient.nonzero().flatten().tolist() == [*range(20, 40), *range(70, 100)]


@quick
@given(seed=st.integers(0, 999), num_video=st.sampled_from([0, 1, 25]), c=st.integers(1, 4))
def test_anchors_take_in_the_three_dropped_tokens_most_like_them(
    seed: int, num_video: int, c: int
) -> None:
    hidden = torch.randn(50, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))
    anchors, absorbed = torch.arange(c), torch.arange(c, 20)
    video = torch.arange(20, 20 + num_video)
    got = merged(hidden, anchors, absorbed, video)
    similar = F.cosine_similarity(hidden[:, None], hidden, dim=-1)
    owner = {i: int(similar[i, :c].argmax()) for i in range(c, 20)}
    near = video.tolist() or list(range(c))
    score = {i: float(similar[i, near].max()) for i in owner}
    for anchor in range(c):
        best = sorted((i for i in owner if owner[i] == anchor), key=lambda i: -score[i])[:3]
        want = hidden[anchor]
        if best:
            weights = torch.tensor([score[i] for i in best]).softmax(0)
            want = (want + weights @ hidden[best]) / 2
        torch.testing.assert_close(got[anchor], want, rtol=0, atol=1e-5)


def test_anchors_are_the_only_states_that_change() -> None:
    layout = clip_layout(4, 10, 100)
    plan, pool = OmniZipSieve.plan(layout, Budget()), pool_for(layout)
    kept = OmniZipSieve().select(pool, plan)
    assert kept.hidden is not None
    changed = (kept.hidden != pool.hidden[kept.indices]).any(dim=1)
    assert changed.sum() == len(plan.sounds.merges[0].anchors)
    assert (pool.kinds[kept.indices[changed]] == Kind.AUDIO).all()


def test_the_pool_itself_is_left_as_it_was() -> None:
    layout = clip_layout(4, 10, 100)
    pool = pool_for(layout)
    before = pool.hidden.clone()
    OmniZipSieve().select(pool, OmniZipSieve.plan(layout, Budget()))
    assert torch.equal(pool.hidden, before)


def test_a_windows_share_grows_from_a_quarter_to_0_65_with_its_sound() -> None:
    # Two windows; the first keeps all of its sound. A budget of what the paper's rates keep.
    layout = clip_layout(4, 100, 100)
    plan = OmniZipSieve.plan(layout, Budget(rho_video=1 - (0.65 + 0.25) / 2))
    shares = window_shares(heard_first(layout, 50), plan.frames, plan.keep_video)
    assert shares.tolist() == pytest.approx([0.65, 0.25])


@pytest.mark.parametrize("keep_video", [1, 40, 180, 300, 399, 400])
def test_the_shares_meet_the_budget_and_keep_their_order(keep_video: int) -> None:
    layout = clip_layout(4, 100, 100)
    frames = OmniZipSieve.plan(layout, Budget()).frames
    first, second = window_shares(heard_first(layout, 50), frames, keep_video).tolist()
    assert 200 * (first + second) == pytest.approx(keep_video)
    assert 0 < second <= first <= 1


def test_a_window_without_sound_keeps_the_average_share() -> None:
    layout = clip_layout(6, 100, 60)  # the sound ends in the second of three windows
    plan = OmniZipSieve.plan(layout, Budget(rho_video=0.6))
    shares = window_shares(heard_first(layout, 50), plan.frames, plan.keep_video).tolist()
    assert shares[2] == pytest.approx(0.4)
    assert shares[0] > shares[1]


def test_a_silent_clip_keeps_as_much_of_every_frame() -> None:
    layout = clip_layout(5, 20, 0)
    plan = OmniZipSieve.plan(layout, Budget(rho_video=0.6))
    kept = OmniZipSieve().select(pool_for(layout), plan).indices
    assert torch.bincount(kept // 20).tolist() == [8] * 5


def test_windows_last_two_seconds_and_frames_take_turns() -> None:
    # Half a second a frame: four frames in a window of 50 audio tokens.
    frames = OmniZipSieve.plan(clip_layout(10, 6, 130, 0.5), Budget()).frames
    assert frames.window.tolist() == [0] * 4 + [1] * 4 + [2] * 2
    assert frames.previous.tolist() == [-1, 0, -1, 2, -1, 4, -1, 6, -1, 8]
    assert frames.sound.tolist() == [[0, 50], [50, 100], [100, 130]]


def test_windows_do_not_straddle_two_clips() -> None:
    clip = Video((1, 2, 8), 1.0, 25)
    frames = OmniZipSieve.plan(lay_out(Prompt().add(clip).add(clip)), Budget()).frames
    assert frames.window.tolist() == [0, 1]
    assert frames.previous.tolist() == [-1, -1]
    assert frames.sound.tolist() == [[0, 25], [25, 50]]


def test_a_second_frame_keeps_what_differs_most_from_the_first() -> None:
    layout = clip_layout(2, 8, 0)
    plan, pool = OmniZipSieve.plan(layout, Budget(rho_video=0.5)), pool_for(layout)
    shares = torch.full((1,), 0.5, dtype=torch.float64)
    kept = choose_video(pool.hidden, plan.frames, shares, plan.keep_video)
    similar = F.cosine_similarity(pool.hidden[8:], pool.hidden[:8], dim=-1)
    want = set(similar.topk(4, largest=False).indices.tolist())
    assert set(kept[8:].nonzero().flatten().tolist()) == want
    best = cluster_scores(pool.hidden[None, :8])[0].topk(4).indices
    assert set(kept[:8].nonzero().flatten().tolist()) == set(best.tolist())


@quick
@given(seed=st.integers(0, 999), size=st.integers(1, 12))
def test_cluster_scores_are_density_times_distance(seed: int, size: int) -> None:
    states = torch.randn(2, size, 4, generator=torch.Generator().manual_seed(seed)).double()
    got = cluster_scores(states.float())
    for frame, scores in zip(states, got, strict=True):
        distance = 1 - F.cosine_similarity(frame[:, None], frame, dim=-1)
        others = [
            [d for j, d in enumerate(row) if j != i] for i, row in enumerate(distance.tolist())
        ]
        if size == 1:
            continue
        density = [np.exp(-np.mean(sorted(row)[:5])) for row in others]
        for i in range(size):
            denser = [float(distance[i, j]) for j in range(size) if density[j] > density[i]]
            gap = min(denser) if denser else max(others[i])
            assert float(scores[i]) == pytest.approx(density[i] * gap, abs=1e-5)


def test_chunks_do_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = clip_layout(9, 12, 230)
    plan, pool = OmniZipSieve.plan(layout, Budget(0.3)), pool_for(layout)
    whole = OmniZipSieve().select(pool, plan)
    monkeypatch.setattr(omnizip, "_CHUNK_TOKENS", 30)
    monkeypatch.setattr(omnizip, "_CHUNK_NUMBERS", 300)
    parts = OmniZipSieve().select(pool, plan)
    assert torch.equal(whole.indices, parts.indices)
    assert whole.hidden is not None
    assert parts.hidden is not None
    torch.testing.assert_close(whole.hidden, parts.hidden, rtol=0, atol=1e-5)


@pytest.mark.parametrize("saliency", [None, torch.zeros(99)])
def test_missing_saliency_is_refused(saliency: torch.Tensor | None) -> None:
    layout = clip_layout(4, 10, 100)
    pool = pool_for(layout)
    pool = Pool(pool.hidden, pool.kinds, pool.positions, pool.media, saliency)
    with pytest.raises(ValueError, match="for each of 100 audio tokens"):
        OmniZipSieve().select(pool, OmniZipSieve.plan(layout, Budget()))


def test_without_sound_no_saliency_is_needed() -> None:
    layout = clip_layout(4, 10, 0)
    pool = pool_for(layout)
    pool = Pool(pool.hidden, pool.kinds, pool.positions, pool.media)
    plan = OmniZipSieve.plan(layout, Budget(0.3))
    assert len(OmniZipSieve().select(pool, plan).indices) == 12
