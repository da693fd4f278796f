"""A Qwen2 layer with Sync-RoPE for training.

Parameters are named as in the checkpoint; refiner and decoder use the same layer with different
attention masks. Attention is spelled out as two products and a softmax: on CPUs, in
bfloat16, its backward pass is much faster than that of the fused kernel.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

from ep_serve.checkpoint.config import head_dim
from ep_serve.rope import apply_sync_rope


class Layer(nn.Module):
    """Attention and feed-forward over (B, L, D)."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.input_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = Qwen2MLP(config)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            hidden: (B, L, D).
            rotation: Cosines and sines (B * L, head_dim / 2) of the tokens' positions.
            mask: Added to the attention's logits: (B or 1, 1, L or 1, L), 0 or -inf.

        Returns:
            (B, L, D).
        """
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, mask)
        refined: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return refined


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.head_dim = head_dim(config)
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        width = config.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.head_dim)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        batch, length, _ = hidden.shape
        query, key = apply_sync_rope(
            self.q_proj(hidden).flatten(0, 1),
            self.k_proj(hidden).flatten(0, 1),
            *rotation,
            self.head_dim,
        )
        groups = self.heads // self.kv_heads
        # (B, kv heads, heads of the group * L, head_dim): a group shares its keys in one product.
        query = query.view(batch, length, self.kv_heads, groups, self.head_dim)
        query = query.permute(0, 2, 3, 1, 4).reshape(batch, self.kv_heads, -1, self.head_dim)
        key = key.view(batch, length, self.kv_heads, self.head_dim).permute(0, 2, 3, 1)
        value = self.v_proj(hidden).view(batch, length, self.kv_heads, self.head_dim)
        logits = (query * (1 / math.sqrt(self.head_dim))) @ key
        logits = logits.view(batch, self.kv_heads, groups, length, length)
        logits = logits + mask[:, None].to(logits.dtype)  # nothing of float32 over all pairs
        weights = logits.softmax(-1).view(batch, self.kv_heads, groups * length, length)
        mixed = weights.to(value.dtype) @ value.transpose(1, 2)
        mixed = mixed.view(batch, self.kv_heads, groups, length, self.head_dim)
        output: Tensor = self.o_proj(mixed.permute(0, 3, 1, 2, 4).reshape(batch, length, -1))
        return output
