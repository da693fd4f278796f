"""Positions that travel with embeddings.

The positions of the survivors are known only once the sieve has run, so they leave
`embed_multimodal` as extra columns beside the embeddings. These columns have the model's dtype, and
bfloat16 holds whole numbers exactly only up to 256: each value is therefore written as three digits
of base 256, which every float dtype holds exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BASE = 256
DIGITS = 3
LIMIT = BASE**DIGITS
"""Values from 0 to LIMIT - 1 can be written."""

_DELTA_OFFSET = LIMIT // 2
_ROWS = 5  # prompt index, T, H, W, delta

COLUMNS = _ROWS * DIGITS
"""Columns that the codec appends to an embedding."""


class Coded(NamedTuple):
    """The header of a run of embedding rows."""

    places: torch.Tensor
    """(n,) int64: places in the reduced prompt."""
    positions: torch.Tensor
    """(3, n) int64: rotary positions."""
    delta: int
    """Position of the first decoded token minus the length of the reduced prompt."""


def append(
    embeddings: torch.Tensor, first_index: int, positions: torch.Tensor, delta: int
) -> torch.Tensor:
    """Write positions beside embeddings.

    Args:
        embeddings: (n, D), any float dtype.
        first_index: place of the first row in the reduced prompt; the rows are consecutive.
        positions: (3, n) int64 on the same device.
        delta: see `Coded.delta`.

    Returns:
        (n, D + COLUMNS) in the dtype of `embeddings`.
    """
    count = embeddings.shape[0]
    index = torch.arange(first_index, first_index + count, device=embeddings.device)
    offset_delta = torch.full_like(index, delta + _DELTA_OFFSET)
    values = torch.cat([index[None], positions, offset_delta[None]])
    digits = [(values >> (8 * place)) & (BASE - 1) for place in range(DIGITS)]
    columns = torch.stack(digits, dim=-1).permute(1, 0, 2).reshape(count, COLUMNS)
    return torch.cat([embeddings, columns.to(embeddings.dtype)], dim=1)


def split(coded: torch.Tensor) -> tuple[torch.Tensor, Coded]:
    """Undo `append`: (n, D + COLUMNS) with n >= 1 to (n, D) embeddings and their header."""
    embeddings, columns = coded[:, :-COLUMNS], coded[:, -COLUMNS:]
    digits = columns.to(torch.int64).reshape(-1, _ROWS, DIGITS)
    weights = torch.tensor([BASE**place for place in range(DIGITS)], device=coded.device)
    values = (digits * weights).sum(-1).T
    delta = int(values[4, 0]) - _DELTA_OFFSET
    return embeddings, Coded(values[0], values[1:4], delta)
