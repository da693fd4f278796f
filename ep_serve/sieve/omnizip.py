"""OmniZip: audio tokens ranked by attention, video tokens pruned where audio is sparse.

arXiv 2511.14582 (CVPR 2026). It needs no training.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from ep_serve.layout import Layout
from ep_serve.sieve.base import Budget, Plan, Pool, Selection, Sieve
from ep_serve.sieve.ranking import indices_of, rank_within
from ep_serve.sieve.similarity import cosine, direction
from ep_serve.sieve.time_windows import Frames, OmniZipPlan, Sounds, plan_windows

MOST_DROPPED, LEAST_DROPPED = 0.75, 0.35
"""Share of a window's picture that goes when none, or all, of its sound is kept."""
MERGED = 3
"""Dropped tokens that one anchor takes in."""
NEIGHBOURS = 5
_CHUNK_NUMBERS = 2**22
_CHUNK_TOKENS = 4096


class OmniZipSieve(Sieve):
    """Keeps salient sound, and more of the picture the more of its sound is kept.

    Of each sound the most salient tokens stay; of the others evenly spaced anchors stay, and each
    takes in the three dropped tokens that are most like it and the picture. In each window of two
    seconds the share of the picture to drop falls from 0.75 to 0.35 with the share of the sound
    that is kept; the first, third, ... frame keeps the centres of its clusters (DPC-kNN), the
    others what differs most from the frame before. Images are kept whole.

    What differs from the paper, because the budget must be known before the saliency is: the
    windows' rates are scaled to meet it (`window_shares`), and their rounding is carried from
    frame to frame. Sounds are chosen one by one, so that they do not depend on each other.
    """

    name = "omnizip"
    reads_text = False
    uses_refiner = False
    uses_saliency = True
    takes_rho = True

    @classmethod
    def plan(cls, layout: Layout, budget: Budget) -> OmniZipPlan:
        """See `Sieve.plan` and `plan_windows`; the paper's rates are 0.3 for sound and 0.6."""
        return plan_windows(layout, budget)

    def select(self, pool: Pool, plan: Plan) -> Selection:
        assert isinstance(plan, OmniZipPlan)
        if plan.size != pool.size:
            raise ValueError(f"the plan is for {plan.size} tokens, the pool has {pool.size}")
        saliency = _saliency(pool, len(plan.sounds.tokens))
        heard, rest = choose_sound(saliency, plan.sounds)
        anchors = [rest[_to(rest, merge.anchors)] for merge in plan.sounds.merges]
        for some in anchors:
            heard[some] = True

        keep = torch.zeros_like(pool.kinds, dtype=torch.bool)
        keep[_to(keep, plan.images)] = True
        audio = _to(keep, plan.sounds.tokens)
        keep[audio] = heard
        shares = window_shares(heard, plan.frames, plan.keep_video)
        keep[_to(keep, plan.frames.tokens)] = choose_video(
            pool.hidden, plan.frames, shares, plan.keep_video
        )
        indices = indices_of(keep, plan.keep)
        if not anchors:
            return Selection(indices)
        hidden = pool.hidden[indices]
        place = keep.cumsum(0) - 1
        for merge, some in zip(plan.sounds.merges, anchors, strict=True):
            absorbed = audio[rest[_to(rest, merge.absorbed)]]
            video = _to(rest, merge.video)
            hidden[place[audio[some]]] = merged(pool.hidden, audio[some], absorbed, video)
        return Selection(indices, hidden)


def _saliency(pool: Pool, num_audio: int) -> Tensor:
    saliency = pool.saliency
    if saliency is None:
        saliency = pool.hidden.new_empty(0)
    if len(saliency) != num_audio:
        raise ValueError(
            f"saliency must hold a value for each of {num_audio} audio tokens, not {len(saliency)}"
        )
    return saliency


def choose_sound(saliency: Tensor, sounds: Sounds) -> tuple[Tensor, Tensor]:
    """Find the most salient tokens of each sound.

    Args:
        saliency: (n,) floating, one for each audio token of the prompt.
        sounds: How many to find.

    Returns:
        (n,) bool, and (r,) int64, the numbers of those that it leaves out, ascending.
    """
    medium, salient = _to(saliency, sounds.medium), _to(saliency, sounds.salient)
    found = rank_within(saliency, medium) < salient[medium]
    return found, indices_of(~found, sounds.num_rest)


def merged(hidden: Tensor, anchors: Tensor, absorbed: Tensor, video: Tensor) -> Tensor:
    """Let each anchor of a sound take in some of the dropped tokens that are most like it.

    A dropped token belongs to the most similar anchor. Of those, an anchor takes in the three most
    similar to any video token (where there is none, to the anchor), and becomes the mean of itself
    and their softmax-weighted mean.

    Args:
        hidden: (n, D) states of the pool.
        anchors: (c,) int64 pool indices, at least one.
        absorbed: (m,) int64, the dropped tokens of the same sound.
        video: (v,) int64, the picture of the same clip.

    Returns:
        (c, D) new states of the anchors.
    """
    states = hidden[anchors]
    dropped = direction(hidden[absorbed])
    closeness, owner = (dropped @ direction(states).T).max(dim=1)
    if len(video):
        parts = (direction(hidden[some]) for some in video.split(_CHUNK_TOKENS))
        closeness = torch.stack([(dropped @ part.T).amax(dim=1) for part in parts]).amax(dim=0)
    # Row i: what anchor i takes in, and a last place for all that it leaves.
    taken = torch.zeros(len(anchors), MERGED + 1, dtype=torch.int64, device=hidden.device)
    weights = torch.full(taken.shape, -torch.inf, device=hidden.device)
    rank = rank_within(closeness, owner).clamp(max=MERGED)
    taken[owner, rank], weights[owner, rank] = absorbed, closeness
    taken, weights = taken[:, :MERGED], weights[:, :MERGED]
    alone = weights.isinf().all(dim=1, keepdim=True)
    weights = weights.masked_fill(alone, 0).softmax(dim=1)
    mean = (hidden[taken].float() * weights[..., None]).sum(dim=1)
    return torch.where(alone, states, ((states.float() + mean) / 2).to(states.dtype))


def window_shares(heard: Tensor, frames: Frames, keep_video: int) -> Tensor:
    """Which share of each window's picture to keep.

    The paper's share is 0.25 where no sound is kept and 0.65 where all is. Where all windows with
    sound would keep more than the budget, each keeps less by the same factor; where they would keep
    less, each drops less by the same factor. Windows without sound keep the clips' average.

    Args:
        heard: (n,) bool, the audio tokens of the prompt that stay.
        frames: The windows.
        keep_video: The budget of the whole prompt.

    Returns:
        (w,) float64 between 0 and 1; weighted by tokens, they sum up to the budget.
    """
    sizes = np.bincount(frames.window, weights=frames.sizes)
    average = keep_video / max(len(frames.tokens), 1)
    has_sound = frames.sound[:, 1] > frames.sound[:, 0]
    if not has_sound.any():
        return torch.full((len(sizes),), average, dtype=torch.float64, device=heard.device)
    before = F.pad(heard.cumsum(0), (1, 0))
    begin, end = _to(heard, frames.sound).T
    retained = (before[end] - before[begin]).double() / (end - begin).clamp(min=1)
    share = 1 - (MOST_DROPPED + (LEAST_DROPPED - MOST_DROPPED) * retained)
    weight = _to(heard, sizes * has_sound)
    total = float((sizes * has_sound).sum())
    aim, published = average * total, (share * weight).sum()
    fewer = share * (aim / published)
    more = 1 - (1 - share) * ((total - aim) / (total - published))
    scaled = torch.where(published >= aim, fewer, more)
    return torch.where(_to(heard, has_sound), scaled, average)


def choose_video(hidden: Tensor, frames: Frames, shares: Tensor, keep_video: int) -> Tensor:
    """Find the tokens of each frame that say most.

    Args:
        hidden: (n, D) states of the pool.
        frames: The video tokens.
        shares: (w,) float64, the share of each window to keep.
        keep_video: How many to find in all.

    Returns:
        (v,) bool, in the order of `frames.tokens`.
    """
    if not keep_video:
        return torch.zeros(len(frames.tokens), dtype=torch.bool, device=hidden.device)
    # Rounding a running sum carries what is cut off one frame over to the next.
    due = (_to(hidden, frames.sizes) * shares[_to(hidden, frames.window)]).cumsum(0)
    due = (due + 0.5).floor().long()
    due[-1] = keep_video
    quota = due.diff(prepend=due.new_zeros(1))
    frame = _to(hidden, frames.frame)
    return rank_within(_video_scores(hidden, frames), frame) < quota[frame]


def _video_scores(hidden: Tensor, frames: Frames) -> Tensor:
    """(v,) float32 scores to be compared within a frame."""
    scores = torch.empty(len(frames.tokens), device=hidden.device)
    tokens = _to(hidden, frames.tokens)
    begins = np.cumsum(frames.sizes) - frames.sizes
    for size in set(frames.sizes.tolist()):
        some = frames.sizes == size
        places = torch.arange(size, device=hidden.device)
        alone = _to(hidden, begins[some & (frames.previous < 0)])[:, None] + places
        for part in alone.split(max(1, min(_CHUNK_NUMBERS // size**2, _CHUNK_TOKENS // size))):
            scores[part] = cluster_scores(hidden[tokens[part]])
        later = np.flatnonzero(some & (frames.previous >= 0))
        now = _to(hidden, begins[later])[:, None] + places
        before = _to(hidden, begins[frames.previous[later]])[:, None] + places
        chunk = max(1, _CHUNK_TOKENS // size)
        for part, earlier in zip(now.split(chunk), before.split(chunk), strict=True):
            states, reference = hidden[tokens[part]].float(), hidden[tokens[earlier]].float()
            scores[part] = -cosine(states, reference)
    return scores


def cluster_scores(states: Tensor) -> Tensor:
    """How well each token of a frame stands for a cluster of its own (DPC-kNN).

    Density times distance: the density is exp(- mean cosine distance to the five nearest), the
    distance that to the nearest denser token, or for the densest to the farthest.

    Args:
        states: (f, n, D).

    Returns:
        (f, n) float32.
    """
    directions = direction(states)
    distance = 1 - directions @ directions.transpose(1, 2)
    size = distance.shape[1]
    if size == 1:
        return distance.squeeze(2)
    distance.diagonal(dim1=1, dim2=2).fill_(0)
    farthest = distance.amax(dim=2)
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = distance.topk(min(NEIGHBOURS, size - 1), dim=2, largest=False).values
    density = (-nearest.mean(dim=2)).exp()
    denser = density[:, None, :] > density[:, :, None]
    gap = distance.masked_fill_(~denser, torch.inf).amin(dim=2)
    return density * torch.where(gap.isinf(), farthest, gap)


def _to(like: Tensor, array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).to(like.device)
