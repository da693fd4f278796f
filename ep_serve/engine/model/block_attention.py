"""Bidirectional attention on a CPU, for the refiner: plain products over blocks of rows.

The tiles of PyTorch's fused attention are small for a CPU without matrix units. Products of a block
of queries with all keys at once are faster there, and a block still fits the cache;
`python -m loadtest.kernels` shows both. As in transformers' eager attention, scores and weights are
bfloat16, and the softmax is computed in float32.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

ROWS = 128
"""Queries of one head that a thread works on at once."""


class BlockAttention(nn.Module):
    """Takes the place of vLLM's `MMEncoderAttention`, for bfloat16."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        max_seqlen: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Let every token see all of its own prompt.

        Args:
            query: (1, n, heads, d), prompts packed behind each other.
            key: (1, n, kv_heads, d); a head serves `heads / kv_heads` successive ones of `query`.
            value: likewise.
            cu_seqlens: (prompts + 1,) borders: 0, then the ends, the last of them n.
            max_seqlen: not needed.

        Returns:
            (1, n, heads, d).
        """
        kv_heads, size = key.shape[2:]
        # (kv_heads, n, heads / kv_heads, d): the queries that share keys lie behind each other.
        shared = (query[0] * size**-0.5).unflatten(1, (kv_heads, -1)).movedim(1, 0).contiguous()
        output = torch.empty_like(shared)
        block = ROWS * torch.get_num_threads()
        for start, end in pairwise(cu_seqlens.tolist()):
            for head in range(kv_heads):
                keys = key[0, start:end, head].T.contiguous()
                values = value[0, start:end, head].contiguous()
                queries = shared[head, start:end].flatten(0, 1)
                results = output[head, start:end].flatten(0, 1)
                for rows, target in zip(queries.split(block), results.split(block), strict=True):
                    torch.mm(torch.softmax(rows @ keys, dim=-1), values, out=target)
        return output.movedim(0, 1).reshape(query.shape)
