"""CS2's bidirectional layers, in vLLM's parallel layers.

They have the shapes and the weight names of decoder layers (checkpoint key `bidir_encoder`), but
every token of a prompt sees every other, and nothing is cached. Requests are packed behind each
other, the attention kernel gets their borders, and no mask exists. The reference is
`bidir_encoder` of the official implementation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models.qwen2 import Qwen2MLP, Qwen2Model
from vllm.model_executor.models.utils import AutoWeightsLoader
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ep_serve.engine.model.block_attention import BlockAttention

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    from ep_serve.engine.model.rotary import SyncRotaryEmbedding

MLP_CHUNK = 8192
"""Tokens that go through the feed-forward part at once: its inner width is several times the
hidden size, so for a long prompt it would hold most of the memory."""


class Refiner(nn.Module):
    """A stack of bidirectional layers, without a final norm."""

    hf_to_vllm_mapper = Qwen2Model.hf_to_vllm_mapper

    def __init__(
        self,
        config: Any,
        num_layers: int,
        rotary: SyncRotaryEmbedding,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            RefinerLayer(config, rotary, quant_config, f"{prefix}.layers.{i}")
            for i in range(num_layers)
        )

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """Refine packed prompts.

        Args:
            hidden: (n, D) embeddings of all prompts behind each other; overwritten.
            positions: (3, n) int64.
            lengths: tokens of each prompt; they sum to n.

        Returns:
            (n, D) refined states.
        """
        borders = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=hidden.device)
        longest = torch.tensor(max(lengths))
        for layer in self.layers:
            hidden = layer(hidden, positions, borders, longest)
        return hidden

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class RefinerLayer(nn.Module):
    """Attention and feed-forward of one bidirectional layer."""

    def __init__(
        self,
        config: Any,
        rotary: SyncRotaryEmbedding,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.self_attn = RefinerAttention(config, rotary, quant_config, f"{prefix}.self_attn")
        self.mlp = Qwen2MLP(
            config.hidden_size,
            config.intermediate_size,
            config.hidden_act,
            quant_config,
            prefix=f"{prefix}.mlp",
        )
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        borders: torch.Tensor,
        longest: torch.Tensor,
    ) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(hidden), positions, borders, longest)
        hidden += attended
        for chunk in hidden.split(MLP_CHUNK):
            chunk += self.mlp(self.post_attention_layernorm(chunk))
        return hidden


class RefinerAttention(nn.Module):
    """Bidirectional attention with Sync-RoPE over packed prompts."""

    def __init__(
        self,
        config: Any,
        rotary: SyncRotaryEmbedding,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        head_dim = rotary.head_size
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            head_dim,
            heads,
            kv_heads,
            bias=True,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            heads * head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.num_heads = heads // ranks
        self.num_kv_heads = max(1, kv_heads // ranks)
        self.head_dim = head_dim
        self.rotary_emb = rotary
        self.attn = self._attention(f"{prefix}.attn")

    def _attention(self, prefix: str) -> nn.Module:
        if current_platform.is_cpu() and torch.get_default_dtype() == torch.bfloat16:
            return BlockAttention()
        attention = MMEncoderAttention(
            self.num_heads, self.head_dim, self.head_dim**-0.5, self.num_kv_heads, prefix=prefix
        )
        if attention.attn_backend == AttentionBackendEnum.FLASHINFER:
            raise ValueError(
                "the refiner cannot use the FLASHINFER encoder attention; choose FLASH_ATTN, "
                "TRITON_ATTN or TORCH_SDPA with --mm-encoder-attn-backend"
            )
        return attention

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        borders: torch.Tensor,
        longest: torch.Tensor,
    ) -> torch.Tensor:
        tokens = hidden.shape[0]
        qkv, _ = self.qkv_proj(hidden)
        widths = [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        query, key, value = qkv.split(widths, dim=-1)
        # Outside compiled graphs nothing fuses the plain form, so CUDA gets the fused kernel.
        rotate = self.rotary_emb.forward_cuda if hidden.is_cuda else self.rotary_emb.forward_native
        query, key = rotate(positions, query, key)
        assert key is not None
        attended = self.attn(
            query.view(1, tokens, self.num_heads, self.head_dim),
            key.view(1, tokens, self.num_kv_heads, self.head_dim),
            value.reshape(1, tokens, self.num_kv_heads, self.head_dim),
            cu_seqlens=borders,
            max_seqlen=longest,
        )
        output, _ = self.o_proj(attended.reshape(tokens, -1))
        return output
