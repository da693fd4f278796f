"""Compares the Triton kernel with the reference.

Runs on CUDA from the tests, and as `TRITON_INTERPRET=1 python -m tests.rope.kernel_check` on a CPU.
"""

from __future__ import annotations

import itertools

import torch

from ep_serve.rope import apply_sync_rope, channel_rows, gather_cos_sin
from ep_serve.rope.triton_kernel import sync_rope
from tests.rope.angles import make_cos_sin_cache

# head_dim, sections, heads, kv_heads: the test checkpoint, the 3B and the 7B model, an odd size.
SHAPES = [
    (128, (18, 18, 18, 10), 2, 1),
    (128, (18, 18, 18, 10), 16, 2),
    (128, (18, 18, 18, 10), 28, 4),
    (80, (11, 11, 11, 7), 3, 3),
]
# The kernel rounds once, and Triton's interpreter rounds bfloat16 towards zero: one unit in the
# last place of the result. In float32, a product and a sum may be contracted.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def check_kernel(device: str) -> None:
    """Every shape, dtype and form of positions, with query and key cut from one projection."""
    for shape, dtype, one_row in itertools.product(SHAPES, TOLERANCE, (False, True)):
        head_dim, sections, heads, kv_heads = shape
        widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        projection = torch.randn(13, sum(widths), device=device).to(dtype)
        before = projection.clone()
        query, key, _ = torch.split(projection, widths, dim=-1)
        # A longer buffer cut short, as the engine keeps positions.
        positions = torch.randint(0, 256, (3, 40), device=device)[:, :13]
        if one_row:
            positions = positions[0]
        cache = make_cos_sin_cache(head_dim, dtype=dtype).to(device)
        borders = channel_rows(sections)

        got = sync_rope(query, key, positions, cache, borders, head_dim)

        cos, sin = gather_cos_sin(cache.float(), positions, borders)
        want = apply_sync_rope(query.float(), key.float(), cos, sin, head_dim)
        for rotated, exact in zip(got, want, strict=True):
            assert rotated.dtype == dtype
            tolerance = TOLERANCE[dtype]
            torch.testing.assert_close(rotated.float(), exact, rtol=tolerance, atol=1e-6)
        assert torch.equal(projection, before), "the inputs must stay as they were"


def check_operator(device: str) -> None:
    """Schema, shapes without data, and tracing, as torch checks a registered operator."""
    borders = channel_rows((18, 18, 18, 10))
    arguments = (
        torch.randn(5, 256, device=device),
        torch.randn(5, 128, device=device),
        torch.randint(0, 256, (3, 5), device=device),
        make_cos_sin_cache(128).to(device),
        [end for _, end, _ in borders[:3]],
        128,
    )
    torch.library.opcheck(torch.ops.ep_serve.sync_rope.default, arguments)


def check_no_tokens(device: str) -> None:
    """An empty batch needs no launch."""
    nothing = sync_rope(
        torch.empty(0, 256, device=device),
        torch.empty(0, 128, device=device),
        torch.empty(3, 0, device=device, dtype=torch.int64),
        make_cos_sin_cache(128).to(device),
        channel_rows((18, 18, 18, 10)),
        128,
    )
    assert [tuple(x.shape) for x in nothing] == [(0, 256), (0, 128)]


if __name__ == "__main__":
    torch.manual_seed(0)
    check_kernel("cpu")
    check_operator("cpu")
    check_no_tokens("cpu")
