from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.records import Probe
from loadtest.search import largest


def carrying(limit: int, most: int) -> tuple[int, list[int]]:
    """Search a server that carries `limit`; what was found and tried."""
    found, probes = largest(
        lambda n: Probe(concurrency=n, met=n <= limit, attained=float(n <= limit)), most
    )
    return found, [probe.concurrency for probe in probes]


@given(st.integers(0, 100), st.integers(1, 64))
def test_the_search_finds_the_limit_and_repeats_no_probe(limit: int, most: int) -> None:
    found, tried = carrying(limit, most)
    assert found == min(limit, most)
    assert len(tried) == len(set(tried))
    assert max(tried) <= most


@pytest.mark.parametrize(
    ("limit", "tried"),
    [(11, [1, 2, 4, 8, 16, 12, 10, 11]), (0, [1]), (64, [1, 2, 4, 8, 16, 32, 64])],
)
def test_the_search_doubles_and_then_halves(limit: int, tried: list[int]) -> None:
    assert carrying(limit, 64) == (limit, tried)
