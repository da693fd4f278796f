from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ep_serve.rope import apply_sync_rope, channel_rows, gather_cos_sin
from tests.goldens import CASES, load_case, needs_goldens
from tests.rope.angles import make_cos_sin_cache

HEAD_DIM = 128
SECTIONS = (18, 18, 18, 10)
BORDERS = channel_rows(SECTIONS)


def rotate(query: Tensor, key: Tensor, positions: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = gather_cos_sin(cache, positions, BORDERS)
    return apply_sync_rope(query, key, cos, sin, HEAD_DIM)


def test_the_published_sections_give_t_the_lowest_frequencies_as_well() -> None:
    assert channel_rows(SECTIONS) == ((0, 18, 0), (18, 36, 1), (36, 54, 2), (54, 64, 0))


@given(st.lists(st.integers(0, 40), min_size=4, max_size=4).filter(any))
def test_borders_cover_every_channel_once(sections: list[int]) -> None:
    channels = [c for start, end, _ in channel_rows(sections) for c in range(start, end)]
    assert channels == list(range(sum(sections)))


@pytest.mark.parametrize("sections", [(16, 24, 24), (1, 2, 3, 4, 5), ()])
def test_sections_must_be_four(sections: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="sections must be 4 widths"):
        channel_rows(sections)


@pytest.mark.parametrize("sections", [(18, 18, 28, -1), (0, 0, 0, 0)])
def test_sections_must_have_channels(sections: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must not be negative and must not all be 0"):
        channel_rows(sections)


def test_sections_of_another_head_size_are_refused() -> None:
    cos, sin = gather_cos_sin(make_cos_sin_cache(128), torch.arange(3), BORDERS)
    with pytest.raises(ValueError, match="half of head_dim 64"):
        apply_sync_rope(torch.zeros(3, 64), torch.zeros(3, 64), cos, sin, 64)


def test_every_channel_pair_turns_by_its_own_row() -> None:
    generator = torch.Generator().manual_seed(0)
    positions = torch.randint(0, 256, (3, 9), generator=generator)
    query = torch.randn(9, 2 * HEAD_DIM, generator=generator)
    key = torch.randn(9, HEAD_DIM, generator=generator)

    rotated_query, rotated_key = rotate(query, key, positions, make_cos_sin_cache(HEAD_DIM))

    row_of_channel = np.repeat([0, 1, 2, 0], SECTIONS)
    frequency = 1e6 ** -(np.arange(64) / 64)
    turn = np.exp(1j * positions.numpy()[row_of_channel].T * frequency)[:, None, :]
    for before, after in ((query, rotated_query), (key, rotated_key)):
        heads = before.numpy().reshape(9, -1, 2, 64)
        expected = (heads[:, :, 0] + 1j * heads[:, :, 1]) * turn
        expected = np.concatenate((expected.real, expected.imag), axis=-1).reshape(9, -1)
        np.testing.assert_allclose(after.numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_row_of_positions_is_three_equal_rows(dtype: torch.dtype) -> None:
    query, key = torch.randn(7, 256).to(dtype), torch.randn(7, 128).to(dtype)
    cache = make_cos_sin_cache(HEAD_DIM)
    positions = torch.randint(0, 256, (7,))
    plain = rotate(query, key, positions, cache)
    rows = rotate(query, key, positions.expand(3, -1), cache)
    assert torch.equal(plain[0], rows[0])
    assert torch.equal(plain[1], rows[1])


@given(shift=st.integers(0, 100), seed=st.integers(0, 2**31))
def test_attention_sees_only_differences_of_positions(shift: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 100, (3, 5), generator=generator)
    query = torch.randn(5, HEAD_DIM, generator=generator)
    key = torch.randn(5, HEAD_DIM, generator=generator)
    cache = make_cos_sin_cache(HEAD_DIM)
    here = rotate(query, key, positions, cache)
    there = rotate(query, key, positions + shift, cache)
    torch.testing.assert_close(here[0] @ here[1].T, there[0] @ there[1].T, rtol=0, atol=1e-3)


def test_no_tokens_are_no_rows() -> None:
    empty = rotate(
        torch.empty(0, 256), torch.empty(0, 128), torch.empty(3, 0).long(), make_cos_sin_cache(128)
    )
    assert [tuple(x.shape) for x in empty] == [(0, 256), (0, 128)]


def test_a_half_precision_query_gets_half_precision_arithmetic() -> None:
    query, key = torch.randn(5, 256).bfloat16(), torch.randn(5, 128).bfloat16()
    positions = torch.randint(0, 256, (3, 5))
    from_float = rotate(query, key, positions, make_cos_sin_cache(HEAD_DIM))
    from_half = rotate(query, key, positions, make_cos_sin_cache(HEAD_DIM, dtype=torch.bfloat16))
    assert from_float[0].dtype == torch.bfloat16
    assert torch.equal(from_float[0], from_half[0])
    assert torch.equal(from_float[1], from_half[1])


@pytest.mark.parametrize("one_row", [True, False])
def test_one_graph_without_breaks_serves_every_length(one_row: bool) -> None:
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rotate, fullgraph=True, dynamic=True, backend=backend)
    cache = make_cos_sin_cache(HEAD_DIM)
    for length in (5, 17, 64):
        query, key, _ = torch.split(torch.randn(length, 512), [256, 128, 128], dim=-1)
        positions = torch.randint(0, 256, (length,) if one_row else (3, length))
        got = compiled(query, key, positions, cache)
        want = rotate(query, key, positions, cache)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert backend.frame_count == 1


@pytest.mark.slow
def test_the_default_compiler_gives_the_same_numbers() -> None:
    compiled = torch.compile(rotate, fullgraph=True, dynamic=True)
    cache = make_cos_sin_cache(HEAD_DIM)
    for length in (5, 17):
        query, key, _ = torch.split(torch.randn(length, 512), [256, 128, 128], dim=-1)
        positions = torch.randint(0, 256, (3, length))
        torch.testing.assert_close(
            compiled(query, key, positions, cache), rotate(query, key, positions, cache)
        )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_a_fourth_section_it_is_the_engines_multimodal_rope(dtype: torch.dtype) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding

    with set_current_vllm_config(VllmConfig()):
        rope = MRotaryEmbedding(128, 128, 64, 1e6, True, dtype, mrope_section=[16, 24, 24])
    query, key = torch.randn(33, 256).to(dtype), torch.randn(33, 128).to(dtype)
    for positions in (torch.randint(0, 256, (3, 33)), torch.randint(0, 256, (33,))):
        want = rope.forward_native(positions, query, key)
        cos, sin = gather_cos_sin(rope.cos_sin_cache, positions, channel_rows((16, 24, 24, 0)))
        got = apply_sync_rope(query, key, cos, sin, 128)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])


@needs_goldens
@pytest.mark.parametrize("case", CASES)
def test_three_rows_replace_the_four_of_the_reference(case: str) -> None:
    four_rows = load_case(case)[1]["rope.position_ids"]
    cache = make_cos_sin_cache(HEAD_DIM, positions=int(four_rows.max()) + 1)
    cos, sin = gather_cos_sin(cache, four_rows[:3], BORDERS)
    for table, got in ((cache[:, :64], cos), (cache[:, 64:], sin)):
        parts = [table[row] for row in four_rows]
        starts = np.cumsum((0, *SECTIONS))
        spans = [part[:, a:b] for part, a, b in zip(parts, starts[:-1], starts[1:], strict=True)]
        assert torch.equal(got, torch.cat(spans, dim=-1))
