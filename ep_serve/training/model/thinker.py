"""The thinker as it is trained: refiner, sieve and decoder over batches, differentiable.

It is the model that the engine serves, with the same rotary embedding, the same score head and the
same rule for who survives. What differs is that batches are padded, and that the choice of the
survivors lets gradients through (straight through the softmax of the scores, as in EchoingPixels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ep_serve.checkpoint.config import ReductionConfig, head_dim, text_config
from ep_serve.rope import channel_rows, gather_cos_sin
from ep_serve.sieve import Ask, Pool, get_sieve
from ep_serve.sieve.cs2 import CS2Sieve
from ep_serve.sieve.omnisift import OmniSiftSieve
from ep_serve.training.model.batch import Batch
from ep_serve.training.model.layers import Layer, RMSNorm
from ep_serve.training.model.omnisift import sift

HIDDEN = float("-inf")


@dataclass(frozen=True, slots=True)
class Output:
    """What a batch came to.

    Attributes:
        logits: (n, V) for the tokens of all answers behind each other, their ends included.
        refined: (B, L, D) states of the full prompts, before anything is dropped.
        decoded: (B, L, D) what the decoder made of them, 0 where a token was dropped.
        scores: (B, L) float32, -inf where there is no AV token; all of them with OmniSIFT, which
            has no scores for the whole pool.
        kept: (B, L) bool, positions of the prompts that the decoder saw.
    """

    logits: Tensor
    refined: Tensor
    decoded: Tensor
    scores: Tensor
    kept: Tensor


@dataclass(frozen=True, slots=True)
class Refined:
    """A batch before the selection.

    Attributes:
        embeddings: (B, L, D) of the full prompts.
        states: (B, L, D) what the refiner made of them; with OmniSIFT, which has none, the same.
        scores: (B, L) float32 as in `Output`.
    """

    embeddings: Tensor
    states: Tensor
    scores: Tensor


class Thinker(nn.Module):
    """Parameters are named as under `thinker.` of the checkpoint; the towers are not part of it."""

    def __init__(
        self,
        config: Any,
        *,
        closed: bool = False,
        frugal: bool = False,
        sieve: str | None = None,
    ) -> None:
        """Make a thinker with random weights.

        Args:
            config: Of a whole EchoingPixels checkpoint.
            closed: Close the bypass: the decoder gets the embeddings of text, not its refined
                states, which have read everything before the selection.
            frugal: Compute activations again in the backward pass instead of keeping them.
            sieve: Let another sieve choose the survivors; by default the scores choose. Those
                without weights choose among the refined tokens. "omnisift" does without the
                refiner and learns its own selector.
        """
        super().__init__()
        text = text_config(config)
        reduction = ReductionConfig.from_hf(config)
        self.model = _Model(text, reduction.refiner_layers)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if text.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.closed = closed
        self.frugal = frugal
        self.sieve = sieve
        if sieve == OmniSiftSieve.name:
            self.compressor = OmniSiftSieve(text.hidden_size)
        self._borders = channel_rows(reduction.sync_rope_sections)
        self._head_dim = head_dim(config)
        self._theta = float(_theta(text))

    def forward(self, batch: Batch) -> Output:
        """Refine, choose, and predict the answers."""
        return self.answer(batch, self.refine(batch))

    def refine(self, batch: Batch) -> Refined:
        """What the sieve sees of a batch; it does not depend on the keep ratios."""
        embeddings = self._embed(batch)
        if self.sieve == OmniSiftSieve.name:
            none = embeddings.new_full(batch.valid.shape, HIDDEN)
            return Refined(embeddings, embeddings, none)
        states = self._run_refiner(embeddings, batch)
        return Refined(embeddings, states, self._score(states, batch))

    def answer(self, batch: Batch, refined: Refined) -> Output:
        """Choose, and predict the answers."""
        states, scores = refined.states, refined.scores
        if self.sieve == OmniSiftSieve.name:
            chosen, through = self._sift(states, batch)
        else:
            chosen = self._choose(states, scores, batch)
            through = let_through(states, scores, chosen)
        if self.closed:
            text = refined.embeddings.to(through.dtype)
            through = torch.where(batch.is_av[..., None], through, text)
        kept = chosen | (batch.valid & ~batch.is_av)
        logits, decoded = self._decode(through, kept, batch)
        return Output(logits, states, decoded, scores, kept)

    def _decode(self, through: Tensor, kept: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (n, V) of all answers, and (B, L, D) what became of the prompts' tokens."""
        states, positions, ends, order = self._shorten(through, kept, batch)
        rotation = self._rotation(positions)
        mask = torch.full((states.shape[1],) * 2, HIDDEN, dtype=states.dtype, device=states.device)
        mask = mask.triu(1)[None, None]  # padding lies behind everything that counts
        for layer in self.model.layers:
            states = self._run(layer, states, rotation, mask)
        states = self.model.norm(states)
        logits: Tensor = self.lm_head(states[ends])
        length = batch.valid.shape[1]
        places = states.new_zeros(len(states), length + batch.answer_ids.shape[1], states.shape[2])
        decoded = places.scatter(1, order[..., None].expand_as(states), states)[:, :length]
        return logits, decoded * kept[..., None]

    def _embed(self, batch: Batch) -> Tensor:
        embeddings: Tensor = self.model.embed_tokens(batch.token_ids)
        mask = batch.is_av[..., None].expand_as(embeddings)
        return embeddings.masked_scatter(mask, batch.av.to(embeddings.dtype))

    def _run_refiner(self, hidden: Tensor, batch: Batch) -> Tensor:
        rotation = self._rotation(batch.positions)
        mask = torch.zeros(batch.valid.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill(~batch.valid, HIDDEN)[:, None, None]
        for layer in self.model.bidir_encoder.layers:
            hidden = self._run(layer, hidden, rotation, mask)
        return hidden

    def _score(self, refined: Tensor, batch: Batch) -> Tensor:
        pool = refined[batch.is_av]
        # Scores rounded to bfloat16 would tie, so mixed precision stops here.
        with torch.autocast(pool.device.type, enabled=False):
            flat = self.model.compressor.scores(pool.to(self.model.norm.weight.dtype))
        scores = flat.new_full(batch.is_av.shape, HIDDEN)
        return scores.masked_scatter(batch.is_av, flat)

    def _choose(self, refined: Tensor, scores: Tensor, batch: Batch) -> Tensor:
        """(B, L) bool, the AV tokens that survive."""
        if self.sieve is None:
            return choose(scores, batch.keep)
        sieve = get_sieve(self.sieve).for_model(refined.shape[2])
        chosen = torch.zeros_like(batch.valid)
        for row, keep in enumerate(batch.keep.tolist()):
            places, pool = _pool(refined, batch, row)
            chosen[row, places[sieve.select(pool, keep)]] = True
        return chosen

    def _sift(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What OmniSIFT keeps, (B, L) bool, and the states with a gradient for its selector."""
        chosen = torch.zeros_like(batch.valid)
        factor = torch.ones(batch.valid.shape, device=embeddings.device)
        for row, ratio in enumerate(batch.keep_ratios.tolist()):
            places, pool = _pool(embeddings, batch, row)
            plan = OmniSiftSieve.plan(batch.layout(row), Ask(ratio))
            with torch.autocast(embeddings.device.type, enabled=False):  # as in `_score`
                kept, own = sift(self.compressor, pool, plan)
            chosen[row, places[kept]] = True
            factor[row, places] = own
        return chosen, embeddings * factor[..., None].to(embeddings.dtype)

    def _shorten(
        self, through: Tensor, kept: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Survivors and answers, with padding behind.

        Returns:
            states (B, L', D), positions (B, 3, L'), (B, L') bool where an answer's next token is
            to be predicted, and (B, L') int64 from where in prompt and answer each one comes.
        """
        answers = self.model.embed_tokens(batch.answer_ids)
        # An answer's last token is predicted, but nothing is predicted from it.
        fed = batch.answer_valid & batch.answer_valid.roll(-1, 1)
        fed[:, -1] = False
        present = torch.cat([kept, fed], dim=1)
        states = torch.cat([through, answers.to(through.dtype)], dim=1)
        positions = torch.cat([batch.positions, batch.answer_positions], dim=2)
        length = int(present.sum(1).max())
        order = (~present).long().argsort(dim=1, stable=True)[:, :length]
        states = states.gather(1, order[..., None].expand(-1, -1, states.shape[2]))
        positions = positions.gather(2, order[:, None].expand(-1, 3, -1))
        place = torch.arange(length, device=states.device)[None]
        total, own = present.sum(1, keepdim=True), fed.sum(1, keepdim=True)
        ends = (place >= total - own - 1) & (place < total)
        return states, positions, ends, order

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B * L, head_dim / 2) at positions (B, 3, L)."""
        flat = positions.transpose(0, 1).flatten(1)
        table = _cos_sin(int(flat.max()) + 1, self._head_dim, self._theta).to(flat.device)
        return gather_cos_sin(table, flat, self._borders)

    def _run(self, layer: nn.Module, hidden: Tensor, rotation: Any, mask: Tensor) -> Tensor:
        if self.frugal and torch.is_grad_enabled():
            output: Tensor = checkpoint(layer, hidden, rotation, mask, use_reentrant=False)
            return output
        output = layer(hidden, rotation, mask)
        return output


class _Model(nn.Module):
    def __init__(self, text: Any, refiner_layers: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.bidir_encoder = _Stack(text, refiner_layers)
        self.compressor = CS2Sieve(text.hidden_size)
        self.layers = nn.ModuleList(Layer(text) for _ in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)


class _Stack(nn.Module):
    def __init__(self, text: Any, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(text) for _ in range(layers))


def _pool(states: Tensor, batch: Batch, row: int) -> tuple[Tensor, Pool]:
    """Where the AV tokens of a prompt stand, and the pool that they make."""
    (places,) = batch.is_av[row].nonzero(as_tuple=True)
    pool = Pool(
        hidden=states[row, places],
        kinds=batch.kinds[row, places],
        positions=batch.positions[row][:, places],
        media=torch.zeros_like(places, dtype=torch.int32),
    )
    return places, pool


def choose(scores: Tensor, keep: Tensor) -> Tensor:
    """The best tokens of each pool, of equal ones those with the lower index.

    Args:
        scores: (B, L) float32, -inf where there is no AV token.
        keep: (B,) int64, survivors of each pool.

    Returns:
        (B, L) bool.
    """
    order = scores.detach().sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank.scatter_(1, order, places)
    return rank < keep[:, None]


def let_through(refined: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    """The states as they are, with a gradient for the scores of the survivors.

    Forward, every state is multiplied by 1. Backward, the factor of a survivor counts as its share
    of the softmax over the pool (straight-through estimator).
    """
    share = scores.softmax(dim=1).masked_fill(~chosen, 0.0)
    factor = 1 + (share - share.detach())
    return refined * factor[..., None].to(refined.dtype)


def _cos_sin(length: int, size: int, theta: float) -> Tensor:
    """(length, head_dim) float32, cosines and sines as vLLM's rotary layers keep them."""
    channels = torch.arange(0, size, 2, dtype=torch.float32)
    places = torch.arange(length, dtype=torch.float32)
    angles = torch.outer(places, 1.0 / theta ** (channels / size))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def _theta(text: Any) -> float:
    parameters = getattr(text, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta") or text.rope_theta)
