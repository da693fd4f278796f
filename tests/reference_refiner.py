"""The refiner in plain torch, small and slow: what the engine's refiner has to be equal to."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ep_serve.rope import apply_sync_rope, channel_rows, gather_cos_sin

_PREFIX = "thinker.model.bidir_encoder."
_SECTIONS = (18, 18, 18, 10)


class ReferenceRefiner(nn.Module):
    """Layers shaped like decoder layers whose attention looks both ways; no norm at the end."""

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        intermediate_size: int,
        num_heads: int,
        num_kv_heads: int,
        rms_norm_eps: float,
        rope_theta: float,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            _Layer(hidden_size, intermediate_size, num_heads, num_kv_heads, rms_norm_eps)
            for _ in range(num_layers)
        )
        self.head_dim = hidden_size // num_heads
        self.rope_theta = rope_theta
        self.borders = channel_rows(_SECTIONS)

    @classmethod
    def from_checkpoint(cls, folder: Path) -> ReferenceRefiner:
        """Read the refiner of a checkpoint in the official layout."""
        config = json.loads((folder / "config.json").read_text())["thinker_config"]["text_config"]
        refiner = cls(
            num_layers=config["av_refiner_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_heads=config["num_attention_heads"],
            num_kv_heads=config["num_key_value_heads"],
            rms_norm_eps=config["rms_norm_eps"],
            rope_theta=config["rope_theta"],
        )
        weights = load_file(folder / "model.safetensors")
        refiner.load_state_dict(
            {k.removeprefix(_PREFIX): v for k, v in weights.items() if k.startswith(_PREFIX)}
        )
        return refiner.eval()

    @torch.inference_mode()
    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Refine (L, D) embeddings of a whole prompt at positions (3, L)."""
        cos, sin = gather_cos_sin(self._cos_sin(int(positions.max()) + 1), positions, self.borders)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        return hidden

    def _cos_sin(self, length: int) -> Tensor:
        channels = torch.arange(0, self.head_dim, 2, dtype=torch.float32)
        frequencies = 1.0 / self.rope_theta ** (channels / self.head_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


class _Layer(nn.Module):
    def __init__(
        self, size: int, intermediate_size: int, num_heads: int, num_kv_heads: int, eps: float
    ) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(size, eps)
        self.self_attn = _Attention(size, num_heads, num_kv_heads)
        self.post_attention_layernorm = nn.RMSNorm(size, eps)
        self.mlp = _MLP(size, intermediate_size)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        refined: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return refined


class _Attention(nn.Module):
    def __init__(self, size: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.head_dim = size // num_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, num_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(size, num_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key = apply_sync_rope(
            self.q_proj(hidden), self.k_proj(hidden), cos, sin, self.head_dim
        )
        query, key, value = (
            x.view(1, len(x), -1, self.head_dim).transpose(1, 2)
            for x in (query, key, self.v_proj(hidden))
        )
        mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        output: Tensor = self.o_proj(mixed[0].transpose(0, 1).flatten(1))
        return output


class _MLP(nn.Module):
    def __init__(self, size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output
