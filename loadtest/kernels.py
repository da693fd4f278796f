"""Benchmark the stages of reduction on this device, without a server.

    python -m loadtest.kernels                                  # a GPU: 3b, 7b; 4 k to 64 k tokens
    python -m loadtest.kernels --shapes embedded --tokens 256   # anywhere

For each shape, with random weights in bfloat16, and each number of AV tokens (and 100 of text):

- the refiner with vLLM's encoder attention, which gets the borders of the packed prompts, beside
  the same layers with torch's attention and a mask; Sync-RoPE's kernel beside plain torch; scoring
  and selection; gathering the kept tokens
- the decoder's prefill of the whole prompt and of the reduced ones. Its layers are the refiner's
  with causal attention, so there is one definition; embedding, norm and logits are left out
- the share of the device's own rate in a large bfloat16 matrix product, and the peak memory of a
  stage without weights and input

Times are medians, in the same process one after the other. The table at the end has the time of
refiner, selection and reduced prefill as shares of the full prefill.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ep_serve.layout import Kind, keep_count
from ep_serve.sieve import Plan, Pool, get_sieve
from loadtest.shapes import KEEP_RATIOS, SHAPES, ModelShape

TEXT = 100
DTYPE = torch.bfloat16


def main() -> None:
    args = _options().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = matrix_rate(device, args.matrix)
    print(
        f"{_name(device)}, torch {torch.__version__}: {rate / 1e12:.2f} TFLOP/s in a matrix product"
    )
    rows: list[dict[str, Any]] = []
    with torch.inference_mode(), vllm_layer_context(device):
        for name in args.shapes:
            bench = Bench(SHAPES[name], device, rate, args.repeats)
            for tokens in args.tokens:
                rows += bench.run(tokens)
            del bench
    print(shares_table(rows))
    if args.json:
        machine = {"device": _name(device), "torch": torch.__version__, "matrix_flops": rate}
        args.json.write_text(json.dumps({**machine, "rows": rows}, indent=1))


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["3b", "7b"])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[4096, 16384, 65536], help="audio and video"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrices (8192)")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    return parser


@contextmanager
def vllm_layer_context(device: torch.device) -> Iterator[None]:
    """Set up vLLM's configuration and a single rank, which its layers need outside of an engine."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.utils.network_utils import get_open_port

    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device=device.type))):
        address = f"tcp://127.0.0.1:{get_open_port()}"
        backend = "nccl" if device.type == "cuda" else "gloo"
        init_distributed_environment(1, 0, address, 0, backend)
        initialize_model_parallel(1)
        before = torch.get_default_dtype()
        torch.set_default_dtype(DTYPE)
        try:
            with device:
                yield
        finally:
            torch.set_default_dtype(before)
            torch.distributed.destroy_process_group()


class Bench:
    """One shape on one device; `run` gives a row for each stage."""

    def __init__(self, shape: ModelShape, device: torch.device, rate: float, repeats: int) -> None:
        from vllm.model_executor.layers.linear import LinearBase

        from ep_serve.engine.model.refiner import Refiner

        self.shape, self.device, self.rate, self.repeats = shape, device, rate, repeats
        config = SimpleNamespace(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            hidden_act="silu",
            rms_norm_eps=1e-6,
        )
        self.rotary = _rotary(shape)
        self.refiner = Refiner(config, shape.refiner_layers, self.rotary, None, "refiner")
        self.decoder = Refiner(config, 1, self.rotary, None, "decoder")
        for index, parameter in enumerate((*self.refiner.parameters(), *self.decoder.parameters())):
            if parameter.ndim == 2:
                torch.manual_seed(index)
                parameter.normal_(std=parameter.shape[1] ** -0.5)
        for module in (*self.refiner.modules(), *self.decoder.modules()):
            if isinstance(module, LinearBase):
                module.quant_method.process_weights_after_loading(module)
        self.sieve = get_sieve("cs2").for_model(shape.hidden)
        self.attentions = _attentions(self.refiner)
        self.kernels = [attention.attn for attention in self.attentions]
        (causal,) = _attentions(self.decoder)
        causal.attn = CausalAttention(self.kernels[0])

    def run(self, tokens: int) -> Iterator[dict[str, Any]]:
        """Measure every stage for a prompt with `tokens` AV tokens."""
        full = tokens + TEXT
        hidden = torch.randn(full, self.shape.hidden)
        positions = torch.arange(full).expand(3, -1).contiguous()
        yield from self._refiner_rows(tokens, hidden, positions)
        yield from self._rope_rows(tokens, positions)
        yield from self._sieve_rows(tokens, hidden[TEXT:], positions[:, TEXT:])
        for ratio in KEEP_RATIOS:
            length = TEXT + keep_count(tokens, ratio)
            yield self._prefill(tokens, ratio, hidden[:length], positions[:, :length])

    def _refiner_rows(
        self, tokens: int, hidden: Tensor, positions: Tensor
    ) -> Iterator[dict[str, Any]]:
        full, layers = hidden.shape[0], self.shape.refiner_layers
        flops = self.shape.linear(layers, full) + self.shape.attention(layers, float(full) ** 2)
        yield self._row(tokens, "refiner", flops, lambda: self._refine(hidden, positions))
        if full > MaskedAttention.longest:
            return
        for attention in self.attentions:
            attention.attn = MaskedAttention()
        yield self._row(tokens, "refiner, mask", flops, lambda: self._refine(hidden, positions))
        for attention, kernel in zip(self.attentions, self.kernels, strict=True):
            attention.attn = kernel

    def _rope_rows(self, tokens: int, positions: Tensor) -> Iterator[dict[str, Any]]:
        shape, full = self.shape, positions.shape[1]
        query = torch.randn(full, shape.heads * shape.head_dim)
        key = torch.randn(full, shape.kv_heads * shape.head_dim)
        plain = self.rotary.forward_native
        yield self._row(tokens, "rope, plain", 0, lambda: plain(positions, query, key))
        if self.device.type == "cuda":
            fused = self.rotary.forward_cuda
            yield self._row(tokens, "rope, kernel", 0, lambda: fused(positions, query, key))

    def _sieve_rows(
        self, tokens: int, hidden: Tensor, positions: Tensor
    ) -> Iterator[dict[str, Any]]:
        pool = Pool(
            hidden=hidden,
            kinds=torch.full((tokens,), int(Kind.VIDEO), dtype=torch.int8),
            positions=positions,
            media=torch.zeros(tokens, dtype=torch.int32),
        )
        plan = Plan(keep_count(tokens, 0.1))
        flops = 2.0 * tokens * self.shape.head_weights
        yield self._row(tokens, "selection", flops, lambda: self.sieve.select(pool, plan))
        kept = self.sieve.select(pool, plan).indices
        yield self._row(tokens, "gather", 0, lambda: hidden[kept])

    def _refine(self, hidden: Tensor, positions: Tensor) -> Tensor:
        refined: Tensor = self.refiner(hidden.clone(), positions, [hidden.shape[0]])
        return refined

    def _prefill(
        self, tokens: int, ratio: float, hidden: Tensor, positions: Tensor
    ) -> dict[str, Any]:
        """One causal layer, times the number of layers."""
        length, layers = hidden.shape[0], self.shape.layers
        flops = self.shape.linear(1, length) + self.shape.attention(1, length * (length + 1) / 2)
        row = self._row(
            tokens,
            f"prefill {ratio:g}",
            flops,
            lambda: self.decoder(hidden.clone(), positions, [length]),
        )
        return row | {"ms": layers * row["ms"]}

    def _row(
        self, tokens: int, stage: str, flops: float, work: Callable[[], object]
    ) -> dict[str, Any]:
        seconds, peak = measure(work, self.device, self.repeats)
        share = flops / seconds / self.rate
        row = {
            "shape": self.shape.name,
            "tokens": tokens,
            "stage": stage,
            "ms": 1e3 * seconds,
            "share": share,
            "peak_mib": peak / 2**20,
        }
        print(
            f"{self.shape.name} {tokens:6} {stage:14} {1e3 * seconds:10.3f} ms "
            f"{100 * share:5.1f} % of the rate {peak / 2**20:8.0f} MiB",
            flush=True,
        )
        return row


class CausalAttention(nn.Module):
    """Causal attention with the interface of the encoder attention, for one prompt."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.version = getattr(like, "_fa_version", None)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: Tensor
    ) -> Tensor:
        if not query.is_cuda:
            return _torch_attention(query, key, value, is_causal=True)
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        attended: Tensor = flash_attn_varlen_func(
            query[0],
            key[0],
            value[0],
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=int(max_seqlen),
            max_seqlen_k=int(max_seqlen),
            causal=True,
            fa_version=self.version,
        )
        return attended


class MaskedAttention(nn.Module):
    """Attention over packed prompts by torch with a T x T mask."""

    longest = 20_000
    """Maximum length; beyond it the mask dominates the memory traffic."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: Tensor
    ) -> Tensor:
        prompt = torch.bucketize(
            torch.arange(query.shape[1], dtype=torch.int32), cu_seqlens[1:], right=True
        )
        return _torch_attention(query, key, value, attn_mask=prompt[:, None] == prompt)


def _torch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask, is_causal=is_causal, enable_gqa=True
    )
    return attended.transpose(1, 2)


def _attentions(layers: nn.Module) -> list[Any]:
    """The modules whose `attn` is the attention kernel, in order."""
    return [module for module in layers.modules() if hasattr(module, "attn")]


def _rotary(shape: ModelShape) -> Any:
    from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

    from ep_serve.engine.model.rotary import SyncRotaryEmbedding

    half = shape.head_dim // 2
    sections = [half * 18 // 64] * 3
    stock = MRotaryEmbedding(
        head_size=shape.head_dim,
        rotary_dim=shape.head_dim,
        max_position_embeddings=32_768,
        base=1_000_000,
        is_neox_style=True,
        dtype=DTYPE,
        mrope_section=[half // 4, half * 3 // 8, half * 3 // 8],
    )
    return SyncRotaryEmbedding(stock, (*sections, half - sum(sections)))


def measure(work: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, int]:
    """Median seconds and peak bytes of `work`; memory is not measured on a CPU."""
    work()
    seconds = []
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if cuda else 0
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() - held if cuda else 0
    return statistics.median(seconds), peak


def matrix_rate(device: torch.device, side: int) -> float:
    """Operations a second in a square bfloat16 matrix product."""
    one, other = (torch.randn(side, side, device=device, dtype=DTYPE) for _ in range(2))
    seconds, _ = measure(lambda: one @ other, device, 10)
    return 2.0 * side**3 / seconds


def shares_table(rows: list[dict[str, Any]]) -> str:
    """Times as shares of the full prefill, in Markdown."""
    lines = [
        "",
        "| shape | AV tokens | keep | refiner | selection | prefill | sum | full / sum |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for shape, tokens in dict.fromkeys((row["shape"], row["tokens"]) for row in rows):
        ms = {
            row["stage"]: row["ms"]
            for row in rows
            if (row["shape"], row["tokens"]) == (shape, tokens)
        }
        full = ms["prefill 1"]
        for ratio in KEEP_RATIOS[1:]:
            parts = [ms["refiner"], ms["selection"] + ms["gather"], ms[f"prefill {ratio:g}"]]
            cells = " | ".join(f"{part / full:.3f}" for part in (*parts, sum(parts)))
            lines.append(f"| {shape} | {tokens} | {ratio:g} | {cells} | {full / sum(parts):.2f}x |")
    return "\n".join(lines)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


if __name__ == "__main__":
    main()
