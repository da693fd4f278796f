"""Padded batches of prompts with media and answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ep_serve.layout import Kind, Layout, keep_count


@dataclass(frozen=True, slots=True)
class Example:
    """One prompt with its AV tokens and its answer.

    Attributes:
        layout: The full prompt.
        av: (N_av, D) embeddings of its AV tokens, in prompt order.
        answer: Token ids, the end token included.
    """

    layout: Layout
    av: Tensor
    answer: Sequence[int]


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples padded on the right.

    Attributes:
        token_ids: (B, L) int64.
        kinds: (B, L) int8.
        positions: (B, 3, L) int64.
        valid: (B, L) bool, false at padding.
        av: (n, D) concatenated AV tokens of all prompts.
        keep: (B,) int64, AV tokens to keep of each prompt, over all kinds.
        keep_ratios: (B,) float64, for sieves that compute their own counts.
        answer_ids: (B, A) int64.
        answer_valid: (B, A) bool.
        answer_positions: (B, 3, A) int64.
    """

    token_ids: Tensor
    kinds: Tensor
    positions: Tensor
    valid: Tensor
    av: Tensor
    keep: Tensor
    keep_ratios: Tensor
    answer_ids: Tensor
    answer_valid: Tensor
    answer_positions: Tensor

    @property
    def is_av(self) -> Tensor:
        """(B, L) bool, true where the embedding comes from a tower."""
        return (self.kinds != int(Kind.TEXT)) & self.valid

    @property
    def targets(self) -> Tensor:
        """(n,) int64, the concatenated tokens of all answers."""
        return self.answer_ids[self.answer_valid]

    def layout(self, row: int) -> Layout:
        """Layout of one prompt without padding; all its media count as one."""
        n = int(self.valid[row].sum())
        kinds = self.kinds[row, :n].cpu().numpy()
        return Layout(
            token_ids=self.token_ids[row, :n].cpu().numpy(),
            kinds=kinds,
            media=np.where(kinds == Kind.TEXT, -1, 0).astype(np.int32),
            positions=self.positions[row, :, :n].cpu().numpy(),
        )

    def to(self, device: str) -> Batch:
        """The same batch on another device."""
        moved = {field.name: getattr(self, field.name).to(device) for field in fields(self)}
        return Batch(**moved)


def collate(examples: Sequence[Example], keep_ratios: Sequence[float]) -> Batch:
    """Collate examples, each with its own keep ratio."""
    length = max(example.layout.length for example in examples)
    answer = max(len(example.answer) for example in examples)
    size = len(examples)
    token_ids = torch.zeros(size, length, dtype=torch.int64)
    kinds = torch.zeros(size, length, dtype=torch.int8)
    positions = torch.zeros(size, 3, length, dtype=torch.int64)
    valid = torch.zeros(size, length, dtype=torch.bool)
    answer_ids = torch.zeros(size, answer, dtype=torch.int64)
    answer_valid = torch.zeros(size, answer, dtype=torch.bool)
    answer_positions = torch.zeros(size, 3, answer, dtype=torch.int64)
    for row, example in enumerate(examples):
        layout, n = example.layout, example.layout.length
        token_ids[row, :n] = torch.from_numpy(layout.token_ids)
        kinds[row, :n] = torch.from_numpy(layout.kinds)
        positions[row, :, :n] = torch.from_numpy(layout.positions)
        valid[row, :n] = True
        m = len(example.answer)
        answer_ids[row, :m] = torch.tensor(example.answer)
        answer_valid[row, :m] = True
        answer_positions[row, :, :m] = layout.next_position + torch.arange(m)
    return Batch(
        token_ids=token_ids,
        kinds=kinds,
        positions=positions,
        valid=valid,
        av=torch.cat([example.av for example in examples]),
        keep=torch.tensor(
            [
                keep_count(example.layout.num_av, ratio)
                for example, ratio in zip(examples, keep_ratios, strict=True)
            ]
        ),
        keep_ratios=torch.tensor(keep_ratios, dtype=torch.float64),
        answer_ids=answer_ids,
        answer_valid=answer_valid,
        answer_positions=answer_positions,
    )
