from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ep_serve.rope import apply_sync_rope, channel_rows, gather_cos_sin
from tests.rope.angles import make_cos_sin_cache

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the compiled Triton kernel needs a CUDA device"
)
BORDERS = channel_rows((18, 18, 18, 10))


@needs_triton
@pytest.mark.slow
def test_the_kernel_interpreted_on_a_cpu_equals_the_reference() -> None:
    # A process of its own: triton reads the variable when a kernel is defined.
    subprocess.run(
        [sys.executable, "-m", "tests.rope.kernel_check"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        timeout=120,
    )


@needs_triton
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_kernel_compiles_for_a_hopper_gpu_with_wide_loads(dtype: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    from ep_serve.rope.triton_kernel import _sync_rope_kernel

    constants = {"end_t": 18, "end_h": 36, "end_w": 54, "heads": 28, "kv_heads": 4, "half": 64}
    constants |= {"padded_heads": 32, "padded_kv_heads": 4, "padded_half": 64}
    signature = {}
    for name in _sync_rope_kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("stride"):
            signature[name] = "i32"
        else:
            signature[name] = "*i64" if name == "positions" else f"*{dtype}"
    # What the launcher finds out by itself: aligned pointers, rows of whole heads.
    aligned = [["tt.divisibility", 16]]
    attributes = {
        (index,): aligned
        for index, name in enumerate(_sync_rope_kernel.arg_names)
        if signature[name] != "constexpr" and not name.startswith("position_")
    }
    source = triton.compiler.ASTSource(_sync_rope_kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert ".v4" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]


@needs_triton
def test_a_cache_of_another_dtype_is_refused() -> None:
    from ep_serve.rope.triton_kernel import sync_rope

    query, key = torch.zeros(3, 256).bfloat16(), torch.zeros(3, 128).bfloat16()
    with pytest.raises(ValueError, match=r"cos_sin_cache must be torch\.bfloat16"):
        sync_rope(query, key, torch.arange(3), make_cos_sin_cache(128), BORDERS, 128)


@needs_triton
def test_a_cache_of_another_head_size_is_refused() -> None:
    from ep_serve.rope.triton_kernel import sync_rope

    query, key = torch.zeros(3, 160), torch.zeros(3, 80)
    with pytest.raises(ValueError, match="half of head_dim 80"):
        sync_rope(query, key, torch.arange(3), make_cos_sin_cache(80), BORDERS, 80)


@needs_triton
@needs_cuda
def test_the_kernel_equals_the_reference() -> None:
    from tests.rope import kernel_check

    kernel_check.check_kernel("cuda")


@needs_triton
@needs_cuda
def test_the_operator_keeps_its_word_to_the_compiler() -> None:
    from tests.rope import kernel_check

    kernel_check.check_operator("cuda")
    kernel_check.check_no_tokens("cuda")


@needs_triton
@needs_cuda
def test_the_kernel_runs_compiled_and_in_a_cuda_graph() -> None:
    from ep_serve.rope.triton_kernel import sync_rope

    cache = make_cos_sin_cache(128).cuda()

    def rotate(projection: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        query, key, _ = torch.split(projection * 2, [256, 128, 128], dim=-1)
        return sync_rope(query, key, positions, cache, BORDERS, 128)

    compiled = torch.compile(rotate, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):  # warm up, record, replay with new numbers
        projection = torch.randn(33, 512, device="cuda")
        positions = torch.randint(0, 256, (3, 33), device="cuda")
        query, key, _ = torch.split(projection * 2, [256, 128, 128], dim=-1)
        cos, sin = gather_cos_sin(cache, positions, BORDERS)
        want = apply_sync_rope(query, key, cos, sin, 128)
        torch.testing.assert_close(compiled(projection, positions), want, rtol=1e-6, atol=1e-6)
