"""OmniSIFT: video tokens pruned by similarity, audio tokens selected by the video left.

arXiv 2602.04804 (ICML 2026). Trained weights for Qwen2.5-Omni are public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ep_serve.layout import Layout, spread
from ep_serve.sieve.base import Budget, Plan, Pool, Selection, Sieve
from ep_serve.sieve.frame_pairs import FramePairs, Ints, PairGroup, find_pairs, thinned
from ep_serve.sieve.similarity import cosine

RHO_AUDIO = 0.3
RHO_VIDEO = 0.7
_WIDTH = 512
_HEADS = 8
_CHUNK_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class OmniSiftPlan(Plan):
    """Attributes beside `keep`.

    Attributes:
        size: AV tokens of the prompt.
        rho_audio, rho_video: The rates; for a keep ratio, those it was mapped to.
        pairs: Which tokens go through the sieve.
        fixed: (n,) pool indices that stay, whatever they hold.
    """

    size: int
    rho_audio: float
    rho_video: float
    pairs: FramePairs
    fixed: Ints


class OmniSiftSieve(Sieve, nn.Module):
    """Drops what repeats in pairs of frames, then the sound that says least about the rest.

    Of each pair, the first frame loses the tokens most similar to its mean, the second as many of
    those most similar to the same place in the first. The sound of the pair keeps what a small
    cross-attention, sound asking picture, scores highest. Pairs never straddle two clips. Images
    are kept whole; a sound without a picture, which has nothing to be judged by, keeps evenly
    spaced tokens.

    Parameters are named as under `thinker.compressor` of the checkpoint.
    """

    name = "omnisift"
    reads_text = False
    uses_refiner = False
    takes_rho = True

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.v_proj = nn.Linear(hidden_size, _WIDTH)
        self.a_proj = nn.Linear(hidden_size, _WIDTH)
        self.v_norm = nn.LayerNorm(_WIDTH)
        self.a_norm = nn.LayerNorm(_WIDTH)
        self.cross_attn = nn.MultiheadAttention(_WIDTH, _HEADS, batch_first=True)
        self.post_attn_norm = nn.LayerNorm(_WIDTH)
        self.score_head = nn.Sequential(
            nn.Linear(_WIDTH, _WIDTH // 2), nn.SiLU(), nn.Linear(_WIDTH // 2, 1)
        )

    @classmethod
    def for_model(cls, hidden_size: int) -> Self:
        return cls(hidden_size)

    @classmethod
    def plan(cls, layout: Layout, budget: Budget) -> OmniSiftPlan:
        """See `Sieve.plan`; a keep ratio is mapped to rates by `FramePairs.rates_for`.

        Args:
            layout: The prompt.
            budget: Where it says nothing, the paper's rates 0.3 and 0.7 hold.
        """
        pairs = find_pairs(layout)
        if budget.keep_ratio is not None:
            rho_audio, rho_video = pairs.rates_for(budget.keep_ratio)
        else:
            rho_audio = RHO_AUDIO if budget.rho_audio is None else float(budget.rho_audio)
            rho_video = RHO_VIDEO if budget.rho_video is None else float(budget.rho_video)
        rho = np.array([rho_audio])
        lone = [s[spread(len(s), int(thinned(len(s), rho)[0]))] for s in pairs.lone_sounds]
        kept = pairs.video_kept(np.array([rho_video])) + pairs.audio_kept(rho, rho_video)
        keep = int(kept[0]) + len(pairs.images)
        if not keep and layout.num_av:  # one token stays: the middle of the pool
            lone.append(spread(layout.num_av, 1))
            keep = 1
        return OmniSiftPlan(
            keep=keep,
            size=layout.num_av,
            rho_audio=rho_audio,
            rho_video=rho_video,
            pairs=pairs,
            fixed=np.concatenate([pairs.images, *lone]),
        )

    def select(self, pool: Pool, plan: Plan) -> Selection:
        assert isinstance(plan, OmniSiftPlan)
        if plan.size != pool.size:
            raise ValueError(f"the plan is for {plan.size} tokens, the pool has {pool.size}")
        kept = [torch.from_numpy(plan.fixed).to(pool.hidden.device)]
        for group in plan.pairs.groups:
            video = self.prune(pool.hidden, group, plan.rho_video)
            kept += [video.flatten(), self._choose_sound(pool.hidden, group, video, plan)]
        return Selection(torch.cat(kept).sort().values)

    def prune(self, hidden: Tensor, group: PairGroup, rho_video: float) -> Tensor:
        """Prune the frames of pairs of one shape.

        Args:
            hidden: (n, D) states of the pool.
            group: The pairs.
            rho_video: Share of a frame to drop.

        Returns:
            (P, v) int64 pool indices of the survivors of each pair.
        """
        first = torch.from_numpy(group.first).to(hidden.device)
        second = torch.from_numpy(group.second).to(hidden.device)
        drop = int(group.dropped(np.array([rho_video]))[0])
        if not drop:
            return torch.cat([first, second], dim=1)
        # In chunks of pairs, so the memory it takes does not grow with the clip.
        chunk = max(1, _CHUNK_TOKENS // (first.shape[1] + second.shape[1]))
        parts = []
        for some_first, some_second in zip(first.split(chunk), second.split(chunk), strict=True):
            states = hidden[some_first].float()
            to_mean = cosine(states, states.mean(dim=1, keepdim=True))
            kept_first = _without_most_similar(some_first, to_mean, drop)
            if group.frames_match:
                to_first = cosine(hidden[some_second].float(), states)
                some_second = _without_most_similar(some_second, to_first, drop)
            parts.append(torch.cat([kept_first, some_second], dim=1))
        return torch.cat(parts)

    def audio_logits(self, audio: Tensor, video: Tensor) -> Tensor:
        """Score audio tokens by their video tokens; the paper's score is the sigmoid of it.

        Args:
            audio: (P, a, D) states in the dtype of the weights.
            video: (P, v, D) states, v at least 1.

        Returns:
            (P, a) float32. A sigmoid would tie large ones, so tokens are ranked without it.
        """
        query = self.a_norm(self.a_proj(audio))
        key_value = self.v_norm(self.v_proj(video))
        attended, _ = self.cross_attn(query, key_value, key_value, need_weights=False)
        first, activation, last = self.score_head
        assert isinstance(last, nn.Linear)
        inner = activation(first(self.post_attn_norm(attended + query)))
        # As in CS2: scores rounded to half precision would tie.
        return F.linear(inner.float(), last.weight.float(), last.bias.float()).squeeze(-1)

    def _choose_sound(
        self, hidden: Tensor, group: PairGroup, video: Tensor, plan: OmniSiftPlan
    ) -> Tensor:
        """Pool indices of the sound that stays, not in order."""
        sound = torch.from_numpy(group.sound).to(hidden.device)
        keep = int(group.sound_kept(np.array([plan.rho_audio]), plan.rho_video)[0])
        if keep == sound.shape[1]:
            return sound.flatten()
        chunk = max(1, _CHUNK_TOKENS // (sound.shape[1] + video.shape[1]))
        logits = torch.cat(
            [
                self.audio_logits(hidden[some_sound], hidden[some_video])
                for some_sound, some_video in zip(
                    sound.split(chunk), video.split(chunk), strict=True
                )
            ]
        )
        best = logits.sort(dim=1, descending=True, stable=True).indices[:, :keep]
        return sound.gather(1, best).flatten()


def _without_most_similar(tokens: Tensor, similarity: Tensor, drop: int) -> Tensor:
    """Drop the `drop` most similar tokens of each row, of equal ones the later."""
    order = similarity.sort(dim=1, stable=True).indices
    return tokens.gather(1, order[:, : tokens.shape[1] - drop])
