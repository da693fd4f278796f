"""The example of `docs/sieves.md`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ep_serve.sieve.base import Plan
from tests.sieve.pools import make_pool

PAGE = Path(__file__).parents[2] / "docs" / "sieves.md"


def test_the_example_of_a_sieve_chooses_the_tokens_it_says() -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    pool = make_pool(9)
    kept = names["LoudestSieve"].for_model(pool.hidden.shape[1]).select(pool, Plan(3)).indices
    dropped = [index for index in range(9) if index not in kept]
    sizes = pool.hidden.norm(dim=1)
    assert kept.tolist() == sorted(kept.tolist())
    assert torch.all(sizes[kept].min() >= sizes[dropped])
