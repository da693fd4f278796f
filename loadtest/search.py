"""Search for the largest concurrency within the service level: doubling, then bisection."""

from __future__ import annotations

from collections.abc import Callable

from loadtest.records import Probe


def largest(probe: Callable[[int], Probe], most: int) -> tuple[int, list[Probe]]:
    """The largest concurrency from 1 to `most` whose probe meets the service level, 0 if none.

    The service level is assumed to be monotonic in the concurrency.

    Args:
        probe: measures one concurrency.
        most: where to stop doubling.
    """
    probes: list[Probe] = []

    def met(concurrency: int) -> bool:
        probes.append(probe(concurrency))
        return probes[-1].met

    good, bad = 0, most + 1
    while good < most:
        wanted = min(most, max(1, 2 * good))
        if not met(wanted):
            bad = wanted
            break
        good = wanted
    while bad - good > 1:
        middle = (good + bad) // 2
        if met(middle):
            good = middle
        else:
            bad = middle
    return good, probes
