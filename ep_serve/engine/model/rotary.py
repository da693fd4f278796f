"""Sync-RoPE in vLLM's rotary path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

from ep_serve.rope import apply_sync_rope, channel_rows, gather_cos_sin

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


class SyncRotaryEmbedding(MRotaryEmbedding):
    """vLLM's multimodal rotary embedding with the four sections of Sync-RoPE.

    Everything but the sections (table, base, scaling) is taken over from the layer it replaces.
    """

    def __init__(self, stock: MRotaryEmbedding, sections: Sequence[int]) -> None:
        super().__init__(
            head_size=stock.head_size,
            rotary_dim=stock.rotary_dim,
            max_position_embeddings=stock.cache_max_position_num,
            base=stock.base,
            is_neox_style=stock.is_neox_style,
            dtype=stock.dtype,
            mrope_section=stock.mrope_section,
            positions_factor=1,
        )
        if stock.rotary_dim != stock.head_size or not stock.is_neox_style:
            raise ValueError("Sync-RoPE needs a neox-style embedding of whole heads")
        self.cos_sin_cache = stock.cos_sin_cache
        self.borders = channel_rows(sections)

    def forward_native(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rotate query (n, heads * head_dim) and key by positions (3, n) or (n,)."""
        assert key is not None
        table = self._match_cos_sin_cache_dtype(query)
        cos, sin = gather_cos_sin(table, positions, self.borders)
        return apply_sync_rope(query, key, cos, sin, self.head_size)

    def forward_cpu(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`forward_native` on CPUs: vLLM's CPU kernel supports three sections only."""
        return self.forward_native(positions, query, key, offsets)

    def forward_cuda(
        self,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same in one fused kernel."""
        from ep_serve.rope.triton_kernel import sync_rope

        assert key is not None
        table = self._match_cos_sin_cache_dtype(query)
        return sync_rope(query, key, positions, table, self.borders, self.head_size)
