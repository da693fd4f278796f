"""Sync-RoPE as one Triton launch: look up the angles and rotate query and key.

Registered as the torch operator `ep_serve::sync_rope`, so it is one opaque node to `torch.compile`
and can be captured in a CUDA graph. The operator returns new tensors instead of writing in place:
query and key are views of one projection, and vLLM turns the newer functionalization of mutating
operators off (`enable_auto_functionalized_v2`), so `torch.compile` would copy that projection for
each of the two before every in-place call. One read and one write is the least either way.

Import this module only where CUDA is; everything in it needs triton.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ep_serve.rope.sync_rope import Border

_OPERATOR = "ep_serve::sync_rope"


def sync_rope(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    borders: Sequence[Border],
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    """`gather_cos_sin` and `apply_sync_rope` in one launch.

    Products and sums are float32 and the result is rounded once, so it equals the reference in
    float32 up to the contraction of a product and a sum, and is more exact than it in float16 and
    bfloat16.

    Args:
        query: (n, heads * head_dim) float32, float16 or bfloat16; rows may be strided.
        key: (n, kv_heads * head_dim), same dtype and device.
        positions: (3, n) rows T, H, W, or (n,); any strides.
        cos_sin_cache: (max_position, head_dim), cosines followed by sines, in the dtype of query:
            the reference rounds them so, and rounding the table here would cost more than the rest.
        borders: from `ep_serve.rope.channel_rows`.
        head_dim: channels of one head; even, any size.

    Returns:
        query, key: new, contiguous tensors of the same shapes and dtypes.

    Raises:
        ValueError: `borders` or `cos_sin_cache` do not cover the head, or the dtypes differ.
    """
    if cos_sin_cache.dtype != query.dtype:
        raise ValueError(f"cos_sin_cache must be {query.dtype} as query, not {cos_sin_cache.dtype}")
    if 2 * borders[-1][1] != head_dim or cos_sin_cache.shape[-1] != head_dim:
        raise ValueError(
            f"borders cover {borders[-1][1]} and cos_sin_cache {cos_sin_cache.shape[-1] // 2} "
            f"channels, but half of head_dim {head_dim}"
        )
    ends = [end for _, end, _ in borders[:3]]
    rotated: tuple[Tensor, Tensor] = torch.ops.ep_serve.sync_rope(
        query, key, positions, cos_sin_cache, ends, head_dim
    )
    return rotated


torch.library.define(
    _OPERATOR,
    "(Tensor query, Tensor key, Tensor positions, Tensor cos_sin_cache, int[3] ends, int head_dim)"
    " -> (Tensor, Tensor)",
)


def _empty_like_rows(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    ends: Sequence[int],
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    return _empty_like_rows(query), _empty_like_rows(key)


def _launch(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    ends: Sequence[int],
    head_dim: int,
) -> tuple[Tensor, Tensor]:
    if query.stride(-1) != 1 or key.stride(-1) != 1 or cos_sin_cache.stride(-1) != 1:
        raise ValueError("query, key and cos_sin_cache must be dense along their last dimension")
    query_out, key_out = _empty_like_rows(query), _empty_like_rows(key)
    tokens = query.shape[0]
    if tokens == 0:
        return query_out, key_out
    heads, kv_heads = query.shape[1] // head_dim, key.shape[1] // head_dim
    _sync_rope_kernel[(tokens,)](
        query,
        key,
        query_out,
        key_out,
        positions,
        cos_sin_cache,
        query.stride(0),
        key.stride(0),
        # Text has one row of positions: with a stride of 0 the kernel reads it three times.
        positions.stride(0) if positions.ndim == 2 else 0,
        positions.stride(-1),
        cos_sin_cache.stride(0),
        end_t=ends[0],
        end_h=ends[1],
        end_w=ends[2],
        heads=heads,
        kv_heads=kv_heads,
        half=head_dim // 2,
        padded_heads=triton.next_power_of_2(heads),
        padded_kv_heads=triton.next_power_of_2(kv_heads),
        padded_half=triton.next_power_of_2(head_dim // 2),
    )
    return query_out, key_out


torch.library.register_fake(_OPERATOR, _fake)
torch.library.impl(_OPERATOR, "default", _launch)


# Strides change with the number of tokens; specializing on them would compile again while serving.
@triton.jit(do_not_specialize=["position_row_stride", "position_stride"])  # type: ignore[untyped-decorator]
def _sync_rope_kernel(
    query: tl.tensor,
    key: tl.tensor,
    query_out: tl.tensor,
    key_out: tl.tensor,
    positions: tl.tensor,
    cos_sin_cache: tl.tensor,
    query_stride: int,
    key_stride: int,
    position_row_stride: int,
    position_stride: int,
    cache_stride: int,
    end_t: tl.constexpr,
    end_h: tl.constexpr,
    end_w: tl.constexpr,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    padded_heads: tl.constexpr,
    padded_kv_heads: tl.constexpr,
    padded_half: tl.constexpr,
) -> None:
    # 64 bits: a long prompt times a wide row passes 2**31 elements.
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, padded_half)
    position = positions + token * position_stride
    row_t = tl.load(position)
    row_h = tl.load(position + position_row_stride)
    row_w = tl.load(position + 2 * position_row_stride)
    row = tl.where(
        channel < end_t,
        row_t,
        tl.where(channel < end_h, row_h, tl.where(channel < end_w, row_w, row_t)),
    )
    angle = cos_sin_cache + row.to(tl.int64) * cache_stride + channel
    in_half = channel < half
    cos = tl.load(angle, mask=in_half, other=0.0).to(tl.float32)
    sin = tl.load(angle + half, mask=in_half, other=0.0).to(tl.float32)

    query_row = query + token * query_stride
    query_out_row = query_out + token * (heads * 2 * half)
    _rotate_heads(query_row, query_out_row, cos, sin, heads, half, padded_heads, padded_half)
    key_row = key + token * key_stride
    key_out_row = key_out + token * (kv_heads * 2 * half)
    _rotate_heads(key_row, key_out_row, cos, sin, kv_heads, half, padded_kv_heads, padded_half)


@triton.jit  # type: ignore[untyped-decorator]
def _rotate_heads(
    row: tl.tensor,
    row_out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    heads: tl.constexpr,
    half: tl.constexpr,
    padded_heads: tl.constexpr,
    padded_half: tl.constexpr,
) -> None:
    head = tl.arange(0, padded_heads)[:, None]
    channel = tl.arange(0, padded_half)[None, :]
    mask = (head < heads) & (channel < half)
    at = head * (2 * half) + channel
    first = tl.load(row + at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(row + at + half, mask=mask, other=0.0).to(tl.float32)
    cos = cos[None, :]
    sin = sin[None, :]
    tl.store(row_out + at, first * cos - second * sin, mask=mask)
    tl.store(row_out + at + half, second * cos + first * sin, mask=mask)
