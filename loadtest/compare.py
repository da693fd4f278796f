"""Ratios between runs, with confidence intervals over repeats.

The interval is a percentile bootstrap: the repeats of both sides are resampled independently,
and 95 % of the ratios of their means lie inside it. It needs at least three repeats on each side to
be meaningful. With one repeat there is no interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.records import Report, Run

Cell = tuple[str, str, float, str]
"""Target, media, seconds of clip, load: see `Run.cell`."""

RESAMPLES = 10_000
CONFIDENCE_PERCENT = 95.0
SEED = 20_240_229


@dataclass(frozen=True, slots=True)
class Ratio:
    """A quotient of means; `low` and `high` bound its confidence interval, if there is one."""

    value: float
    low: float | None
    high: float | None
    repeats: tuple[int, int]

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


def ratio(above: Sequence[float], below: Sequence[float]) -> Ratio | None:
    """mean(above) / mean(below); None where a side is empty or the divisor 0."""
    if not above or not below or not np.mean(below):
        return None
    repeats = (len(above), len(below))
    value = float(np.mean(above) / np.mean(below))
    if min(repeats) < 2:
        return Ratio(value, None, None, repeats)
    rng = np.random.default_rng(SEED)
    means = [_resampled(side, rng) for side in (above, below)]
    edge = (100 - CONFIDENCE_PERCENT) / 2
    low, high = np.percentile(means[0] / means[1], [edge, 100 - edge])
    return Ratio(value, float(low), float(high), repeats)


def _resampled(values: Sequence[float], rng: np.random.Generator) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    drawn: np.ndarray = array[rng.integers(0, len(array), (RESAMPLES, len(array)))].mean(axis=1)
    return drawn


def first_token(run: Run) -> float | None:
    """Median TTFT in seconds."""
    return _percentile(run, "ttft_s", "p50")


def output_token(run: Run) -> float | None:
    """Median TPOT in seconds."""
    return _percentile(run, "tpot_s", "p50")


def end_to_end(run: Run) -> float | None:
    """Median E2E in seconds."""
    return _percentile(run, "e2e_s", "p50")


def rate(run: Run) -> float | None:
    """Requests a second."""
    value: float = run.figures["requests_per_s"]
    return value


def kv_blocks(run: Run) -> float | None:
    """KV blocks of one request."""
    value: float | None = run.figures["server"]["kv_blocks_per_request"]
    return value


def memory(run: Run) -> float | None:
    """Peak memory of the server's processes in bytes."""
    value: float | None = run.figures["server"]["memory_bytes_peak"]
    return value


def linear_stage_seconds(run: Run) -> float | None:
    """Seconds of a request in stages with work linear in the clip's length.

    Excludes queueing, and refiner and prefill, whose attention is quadratic.
    """
    measured = [run.figures["stages_s"].get(name) for name in LINEAR_STAGES]
    known = [seconds for seconds in measured if seconds is not None]
    return sum(known) if known else None


def _percentile(run: Run, name: str, point: str) -> float | None:
    values = run.figures[name]
    return values[point] if values else None


ALL_TOKENS = ("stock", "none")
"""Targets that do not reduce."""
LINEAR_STAGES = ("fetch", "decode", "features", "layout", "item", "towers", "selection")
Measure = Callable[[Run], float | None]
FIGURES: dict[str, Measure] = {
    "TTFT p50": first_token,
    "TPOT p50": output_token,
    "E2E p50": end_to_end,
    "requests/s": rate,
    "KV blocks per request": kv_blocks,
    "memory peak": memory,
}


def cells(report: Report) -> dict[Cell, list[Run]]:
    """Complete runs, grouped by measurement."""
    grouped: dict[Cell, list[Run]] = {}
    for run in report.runs:
        if not run.interrupted and run.figures["whole"]:
            grouped.setdefault(run.cell, []).append(run)
    return grouped


def values(runs: Sequence[Run], figure: Measure) -> list[float]:
    """One value for each repeat that has it."""
    found = (figure(run) for run in runs)
    return [value for value in found if value is not None]


def compare(a: Report, b: Report) -> str:
    """Ratios A / B of all figures for the measurements of both, in Markdown."""
    theirs = cells(b)
    lines = [
        f"A / B with a {CONFIDENCE_PERCENT:g} % confidence interval; repeats of A and of B",
        "",
    ]
    lines += [f"| what | {' | '.join(FIGURES)} | repeats |", "|---|" + "---:|" * (len(FIGURES) + 1)]
    shared = {cell: runs for cell, runs in cells(a).items() if cell in theirs}
    for cell, runs in shared.items():
        ratios = [ratio(values(runs, f), values(theirs[cell], f)) for f in FIGURES.values()]
        shown = [str(r) if r else "-" for r in ratios]
        target, media, seconds, load = cell
        lines.append(
            f"| {target}, {media}, {seconds:g} s, {load} | {' | '.join(shown)} "
            f"| {len(runs)}, {len(theirs[cell])} |"
        )
    if not shared:
        lines.append("the reports have no measurement in common")
    if a.machine != b.machine:
        lines += ["", "The two were measured on different machines."]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Gain:
    """Gains of a target over the baseline in one cell, with their analytical bounds."""

    cell: Cell
    first_token: Ratio | None
    requests: Ratio | None
    kv: Ratio | None
    first_token_bound: float | None
    requests_bound: float | None

    def share_of_bound(self) -> float | None:
        """Measured gain in time to first token / its bound."""
        if self.first_token is None or self.first_token_bound is None:
            return None
        return self.first_token.value / self.first_token_bound


def gains(report: Report) -> list[Gain]:
    """Every target against the baseline at the same media, length and load."""
    grouped = cells(report)
    bounds = {(bound.target, bound.seconds): bound for bound in report.bounds}
    found = []
    for cell, runs in grouped.items():
        target, media, seconds, load = cell
        base = grouped.get((report.baseline or "", media, seconds, load))
        if base is None or target == report.baseline:
            continue
        bound = bounds.get((target, seconds))
        # The bounds are those against all tokens, and what caches save is in none of them.
        comparable = media == "unique" and report.baseline in ALL_TOKENS
        found.append(
            Gain(
                cell,
                ratio(values(base, first_token), values(runs, first_token)),
                ratio(values(runs, rate), values(base, rate)),
                ratio(values(base, kv_blocks), values(runs, kv_blocks)),
                bound.first_token if bound and comparable else None,
                bound.request if bound and comparable else None,
            )
        )
    return found
