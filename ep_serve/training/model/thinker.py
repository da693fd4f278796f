"""The trainable thinker: refiner, sieve and decoder over padded batches.

Rotary embedding, score head and selection rule are those of the engine. The selection passes
gradients to the scores by a straight-through estimator over their softmax, as in EchoingPixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from ep_serve.checkpoint.config import ReductionConfig, head_dim, text_config
from ep_serve.rope import channel_rows, gather_cos_sin
from ep_serve.sieve import Budget, Plan, Pool, get_sieve
from ep_serve.sieve.cs2 import CS2Sieve
from ep_serve.sieve.omnisift import OmniSiftSieve
from ep_serve.training.model.batch import Batch
from ep_serve.training.model.layers import Layer
from ep_serve.training.model.omnisift import select_with_gradient

NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True, slots=True)
class Output:
    """Output of the model for a batch.

    Attributes:
        logits: (n, V) for the tokens of all answers behind each other, their ends included.
        refined: (B, L, D) states of the full prompts, before anything is dropped.
        decoded: (B, L, D) the decoder's states, 0 where a token was dropped.
        scores: (B, L) float32, -inf where there is no AV token; all of them with OmniSIFT, which
            has no scores for the whole pool.
        kept: (B, L) bool, positions of the prompts that were kept.
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
        states: (B, L, D) refined states; with OmniSIFT, the embeddings.
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
        close_bypass: bool = False,
        checkpoint_activations: bool = False,
        sieve: str | None = None,
    ) -> None:
        """Make a thinker with random weights.

        Args:
            config: Configuration of an EchoingPixels checkpoint.
            close_bypass: The decoder gets the embeddings of text tokens instead of their refined
                states, which attended to all AV tokens before the selection.
            checkpoint_activations: Recompute activations in the backward pass to save memory.
            sieve: Sieve that selects instead of CS2. Sieves without weights select among the
                refined tokens; "omnisift" has no refiner and trains its own selector.
        """
        super().__init__()
        text = text_config(config)
        reduction = ReductionConfig.from_hf(config)
        self.model = _Model(text, reduction.refiner_layers)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if text.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.close_bypass = close_bypass
        self.checkpoint_activations = checkpoint_activations
        self.sieve = sieve
        if sieve == OmniSiftSieve.name:
            self.compressor = OmniSiftSieve(text.hidden_size)
        self._borders = channel_rows(reduction.sync_rope_sections)
        self._head_dim = head_dim(config)
        self._theta = float(_theta(text))

    def forward(self, batch: Batch) -> Output:
        """Refine, select, and predict the answers."""
        return self.answer(batch, self.refine(batch))

    def refine(self, batch: Batch) -> Refined:
        """Compute the sieve's inputs of a batch, which do not depend on the keep ratios."""
        embeddings = self._embed(batch)
        if self.sieve == OmniSiftSieve.name:
            none = embeddings.new_full(batch.valid.shape, NEGATIVE_INFINITY)
            return Refined(embeddings, embeddings, none)
        states = self._run_refiner(embeddings, batch)
        return Refined(embeddings, states, self._score(states, batch))

    def answer(self, batch: Batch, refined: Refined) -> Output:
        """Select, and predict the answers."""
        states, scores = refined.states, refined.scores
        if self.sieve == OmniSiftSieve.name:
            chosen, through = self._select_omnisift(states, batch)
        else:
            chosen = self._select(states, scores, batch)
            through = straight_through(states, scores, chosen)
        if self.close_bypass:
            text = refined.embeddings.to(through.dtype)
            through = torch.where(batch.is_av[..., None], through, text)
        kept = chosen | (batch.valid & ~batch.is_av)
        logits, decoded = self._decode(through, kept, batch)
        return Output(logits, states, decoded, scores, kept)

    def _decode(self, through: Tensor, kept: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (n, V) of all answers, and decoder states (B, L, D) of the prompts."""
        states, positions, ends, order = self._compact(through, kept, batch)
        rotation = self._rotation(positions)
        mask = torch.full(
            (states.shape[1],) * 2, NEGATIVE_INFINITY, dtype=states.dtype, device=states.device
        )
        mask = mask.triu(1)[None, None]  # padding comes after all tokens that count
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
        mask = mask.masked_fill(~batch.valid, NEGATIVE_INFINITY)[:, None, None]
        for layer in self.model.bidir_encoder.layers:
            hidden = self._run(layer, hidden, rotation, mask)
        return hidden

    def _score(self, refined: Tensor, batch: Batch) -> Tensor:
        pool = refined[batch.is_av]
        # Scores rounded to bfloat16 would tie, so mixed precision stops here.
        with torch.autocast(pool.device.type, enabled=False):
            flat = self.model.compressor.scores(pool.to(self.model.norm.weight.dtype))
        scores = flat.new_full(batch.is_av.shape, NEGATIVE_INFINITY)
        return scores.masked_scatter(batch.is_av, flat)

    def _select(self, refined: Tensor, scores: Tensor, batch: Batch) -> Tensor:
        """Select the AV tokens to keep, (B, L) bool."""
        if self.sieve is None:
            return select_top(scores, batch.keep)
        sieve = get_sieve(self.sieve).for_model(refined.shape[2])
        chosen = torch.zeros_like(batch.valid)
        for row, keep in enumerate(batch.keep.tolist()):
            places, pool = _pool(refined, batch, row)
            chosen[row, places[sieve.select(pool, Plan(keep)).indices]] = True
        return chosen

    def _select_omnisift(self, embeddings: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """OmniSIFT's selection (B, L) bool, and states with a gradient for its selector."""
        chosen = torch.zeros_like(batch.valid)
        factor = torch.ones(batch.valid.shape, device=embeddings.device)
        for row, ratio in enumerate(batch.keep_ratios.tolist()):
            places, pool = _pool(embeddings, batch, row)
            plan = OmniSiftSieve.plan(batch.layout(row), Budget(ratio))
            with torch.autocast(embeddings.device.type, enabled=False):  # as in `_score`
                kept, own = select_with_gradient(self.compressor, pool, plan)
            chosen[row, places[kept]] = True
            factor[row, places] = own
        return chosen, embeddings * factor[..., None].to(embeddings.dtype)

    def _compact(
        self, through: Tensor, kept: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Move kept tokens and answers to the front, padding to the end.

        Returns:
            states (B, L', D), positions (B, 3, L'), (B, L') bool where an answer's next token
            is predicted, and (B, L') int64 source index of each token in prompt and answer.
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
        if self.checkpoint_activations and torch.is_grad_enabled():
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
        self.norm = Qwen2RMSNorm(text.hidden_size, text.rms_norm_eps)


class _Stack(nn.Module):
    def __init__(self, text: Any, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(text) for _ in range(layers))


def _pool(states: Tensor, batch: Batch, row: int) -> tuple[Tensor, Pool]:
    """Indices of the AV tokens of a prompt, and their pool."""
    (places,) = batch.is_av[row].nonzero(as_tuple=True)
    pool = Pool(
        hidden=states[row, places],
        kinds=batch.kinds[row, places],
        positions=batch.positions[row][:, places],
        media=torch.zeros_like(places, dtype=torch.int32),
    )
    return places, pool


def select_top(scores: Tensor, keep: Tensor) -> Tensor:
    """Select the highest scores of each pool; ties go to the lower index.

    Args:
        scores: (B, L) float32, -inf where there is no AV token.
        keep: (B,) int64, tokens to keep of each pool.

    Returns:
        (B, L) bool.
    """
    order = scores.detach().sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    rank.scatter_(1, order, places)
    return rank < keep[:, None]


def straight_through(refined: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    """Return the states unchanged, with a gradient for the scores of the kept tokens.

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
