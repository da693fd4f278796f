"""How sure a share, and a ratio of two shares, is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
"""Standard deviations of a normal distribution around its mean that hold 95 % of it."""
RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def wilson(right: int, count: int) -> Estimate:
    """A share with Wilson's score interval (Wilson 1927), valid near 0 and 1 and for few samples.

    Raises:
        ValueError: `count` is 0, or `right` is not from 0 to `count`.
    """
    if not 0 <= right <= count or count == 0:
        raise ValueError(f"right must be from 0 to count, and count above 0: {right} of {count}")
    share, spread = right / count, Z_95**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z_95 / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    # Exact at the ends, where rounding could leave them a little outside.
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == count else middle + half
    return Estimate(share, low, high)


def paired_ratio(
    right: Sequence[bool], base: Sequence[bool], clips: Sequence[str], seed: int = 0
) -> Estimate | None:
    """The ratio of two accuracies on the same questions, with a bootstrap interval.

    Clips are drawn with replacement, with all of their questions and both of their answers: what is
    hard for one is hard for the other, and questions about one clip are not independent.

    Args:
        right: Whether each answer was right.
        base: The same for the answers that they are compared with.
        clips: The clip of each question.
        seed: Of the draws.

    Returns:
        The ratio and the 2.5th and 97.5th percentile of `RESAMPLES` draws; None if no answer of the
        base is right.
    """
    if not any(base):
        return None
    _, where = np.unique(np.asarray(clips), return_inverse=True)
    ours, theirs = _by_clip(right, where), _by_clip(base, where)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(ours), np.full(len(ours), 1 / len(ours)), RESAMPLES)
    above, below = draws @ ours, draws @ theirs
    ratios = above[below > 0] / below[below > 0]
    low, high = np.quantile(ratios, (0.025, 0.975)).tolist()
    return Estimate(sum(right) / sum(base), low, high)


def _by_clip(right: Sequence[bool], where: NDArray[np.int64]) -> NDArray[np.float64]:
    counts = np.zeros(where.max() + 1)
    np.add.at(counts, where, np.asarray(right, dtype=np.float64))
    return counts
