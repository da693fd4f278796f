from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from ep_serve.engine.model.block_attention import BlockAttention


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [[300], [1, 130, 70]])
def test_it_is_attention_within_each_prompt(heads: int, kv_heads: int, lengths: list[int]) -> None:
    torch.manual_seed(0)
    n, size = sum(lengths), 32
    query = torch.randn(1, n, heads, size).bfloat16()
    key, value = (torch.randn(1, n, kv_heads, size).bfloat16() for _ in range(2))
    borders = torch.tensor([0, *lengths]).cumsum(0)
    found = BlockAttention()(query, key, value, cu_seqlens=borders)
    assert found.shape == query.shape
    assert found.dtype == torch.bfloat16
    for start, end in itertools.pairwise(borders.tolist()):
        q, k, v = (t[0, start:end].transpose(0, 1).double() for t in (query, key, value))
        expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(0, 1)
        torch.testing.assert_close(found[0, start:end].double(), expected, atol=0.02, rtol=0.02)
