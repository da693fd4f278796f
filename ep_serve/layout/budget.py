"""How many tokens of a pool survive, and where evenly spaced ones lie."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt


def keep_count(num_av: int, keep_ratio: float) -> int:
    """Return the budget of a pool, max(1, ceil(num_av * keep_ratio)), or 0 for an empty pool.

    The product is a Python float, as in the official EchoingPixels code, so its rounding counts:
    100 tokens at 0.07 keep 8.

    Raises:
        ValueError: `keep_ratio` is not a number with 0 < keep_ratio <= 1 (whatever `num_av` is),
            or `num_av` is negative.
    """
    given: object = keep_ratio  # often straight from a request, whatever the annotation says
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= 1:
        raise ValueError(f"keep_ratio must be a number above 0 and at most 1, not {given!r}")
    if num_av < 0:
        raise ValueError(f"num_av must be at least 0, not {num_av!r}")
    if num_av == 0:
        return 0
    return max(1, math.ceil(num_av * float(keep_ratio)))


def spread(num_av: int, k: int) -> npt.NDArray[np.int64]:
    """Return evenly spaced pool indices, floor((i + 0.5) * num_av / k) for i = 0 .. k - 1.

    Each index is the middle of one of k equal stretches of the pool. Whole-number arithmetic, so
    the result does not depend on rounding.

    Returns:
        (k,) int64, strictly ascending.

    Raises:
        ValueError: `k` is negative or larger than `num_av`.
    """
    if not 0 <= k <= num_av:
        raise ValueError(f"k must lie between 0 and num_av {num_av!r}, not {k!r}")
    odd = 2 * np.arange(k, dtype=np.int64) + 1
    return odd * num_av // max(2 * k, 1)
