from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ep_serve.engine.model import position_codec

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
POSITION = st.integers(0, position_codec.LIMIT - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_positions_survive_every_float_dtype(dtype: torch.dtype, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.tuples(POSITION, POSITION, POSITION), min_size=1, max_size=8))
    delta = data.draw(st.integers(-(2**23), 2**23 - 1))
    first = data.draw(st.integers(0, 2**20))
    embeddings = torch.randn(len(rows), 4).to(dtype)
    positions = torch.tensor(rows).T
    coded = position_codec.append(embeddings, first, positions, delta)
    back, found = position_codec.split(coded)
    assert coded.dtype == dtype
    assert torch.equal(back, embeddings)
    assert torch.equal(found.positions, positions)
    assert found.places.tolist() == list(range(first, first + len(rows)))
    assert found.delta == delta


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [255, 256, 257, 65_535, 65_536, 65_537, 131_071])
def test_large_positions_are_exact(dtype: torch.dtype, position: int) -> None:
    positions = torch.full((3, 1), position)
    coded = position_codec.append(torch.zeros(1, 2, dtype=dtype), 0, positions, 0)
    assert torch.equal(position_codec.split(coded)[1].positions, positions)


def test_any_part_of_a_prompt_can_be_read_alone() -> None:
    positions = torch.arange(30).reshape(3, 10) * 1000
    coded = position_codec.append(torch.zeros(10, 2, dtype=torch.bfloat16), 0, positions, -7)
    _, found = position_codec.split(coded[4:7])
    assert found.places.tolist() == [4, 5, 6]
    assert torch.equal(found.positions, positions[:, 4:7])
    assert found.delta == -7
