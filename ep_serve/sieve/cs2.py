"""CS2, the score head of EchoingPixels: the best tokens of one joint pool (paper's CS2)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ep_serve.sieve.base import Plan, Pool, Selection, Sieve

_CHUNK_TOKENS = 4096


class CS2Sieve(Sieve, nn.Module):
    """Scores every refined AV token by itself and keeps the highest scores.

    Parameters are named as under `thinker.model.compressor` of the checkpoint: `ln.weight` (D,),
    `score_head.0` (D to D) and `score_head.2` (D to 1), both with bias.
    """

    name = "cs2"
    reads_text = True
    uses_refiner = True

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.ln = _RMSNorm(hidden_size)
        self.score_head = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, 1)
        )

    @classmethod
    def for_model(cls, hidden_size: int) -> Self:
        return cls(hidden_size)

    def scores(self, hidden: Tensor) -> Tensor:
        """Raw scores: W2 silu(W1 rmsnorm(h) + b1) + b2.

        Works through the tokens in chunks, so the memory it takes does not grow with the prompt.
        The last product is float32 whatever the dtype of the weights: scores rounded to bfloat16
        would tie by the dozen, and ties fall to the lower index.

        Args:
            hidden: (n, D) in the dtype of the weights.

        Returns:
            (n,) float32.
        """
        parts = [self._score_chunk(chunk) for chunk in torch.split(hidden, _CHUNK_TOKENS)]
        return torch.cat(parts)

    def _score_chunk(self, hidden: Tensor) -> Tensor:
        first, activation, last = self.score_head
        assert isinstance(last, nn.Linear)
        active = activation(first(self.ln(hidden)))
        return F.linear(active.float(), last.weight.float(), last.bias.float()).squeeze(-1)

    def select(self, pool: Pool, plan: Plan) -> Selection:
        """Keep the highest raw scores, of equal ones those with the lower index.

        The softmax of the paper keeps the order but underflows in float32, so it is left out.
        """
        pool.check_budget(plan.keep)
        scores = self.scores(pool.hidden)
        best_first = scores.sort(descending=True, stable=True).indices
        return Selection(best_first[: plan.keep].sort().values, scores=scores)


class _RMSNorm(nn.Module):
    """Root-mean-square norm as in Qwen2: float32 inside, rounded before the weight is applied."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        exact = hidden.float()
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * exact.to(hidden.dtype)
