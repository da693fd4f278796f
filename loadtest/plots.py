"""Plots of a report, as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.compare import Cell, Measure, cells, first_token, kv_blocks, memory, rate, values
from loadtest.records import Report, Run

DPI = 110
GIB = 2**30
ORDER = (
    *("fetch", "decode", "features", "layout", "item"),
    *("before the queue", "rest before the queue", "queue"),
    *("towers", "refiner", "selection", "prefill", "until first token", "generation"),
)
"""Stages of a request in order."""


def draw(report: Report) -> dict[str, bytes]:
    """Draw all plots for which the report has data, by file name."""
    grouped = cells(report)
    if not grouped:
        return {}
    pictures = {
        "latency_throughput.png": latency_throughput(grouped),
        "kv_keep_ratio.png": kv_keep_ratio(report, grouped),
        "time_lines.png": time_lines(report),
        "stages.png": stages(grouped),
        "clip_length.png": clip_length(grouped),
    }
    return {name: _png(figure) for name, figure in pictures.items() if figure is not None}


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with mpl.rc_context({"font.size": 9}):
        figure.savefig(file, format="png", dpi=DPI, bbox_inches="tight")
    return file.getvalue()


def _mean(runs: Sequence[Run], figure: Measure) -> float:
    found = values(runs, figure)
    return float(np.mean(found)) if found else float("nan")


def latency_throughput(grouped: dict[Cell, list[Run]]) -> Figure:
    """Median time to first token against requests a second, a line for each target."""
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for (target, media, seconds, load), runs in grouped.items():
        label = f"{target}, {media}, {seconds:g} s"
        point = (_mean(runs, rate), _mean(runs, first_token), load)
        lines.setdefault(label, []).append(point)
    for label, points in lines.items():
        x, y, loads = zip(*points, strict=True)
        axes.plot(x, y, marker="o", label=label)
        for where, text in zip(zip(x, y, strict=True), loads, strict=True):
            axes.annotate(text, where, textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel="requests a second", ylabel="time to first token, median, s")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)
    return figure


def kv_keep_ratio(report: Report, grouped: dict[Cell, list[Run]]) -> Figure | None:
    """KV blocks of one request against the keep ratio, at the lightest load."""
    ratios = _ratios(report)
    found: dict[float, dict[float, float]] = {}
    for (target, _, seconds, _), runs in grouped.items():
        if target in ratios and (blocks := values(runs, kv_blocks)):
            found.setdefault(seconds, {}).setdefault(ratios[target], float(np.mean(blocks)))
    if not found:
        return None
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for seconds, points in found.items():
        ordered = sorted(points.items())
        axes.plot(*zip(*ordered, strict=True), marker="o", label=f"{seconds:g} s")
    axes.set(xlabel="keep ratio (1: all tokens)", ylabel="KV blocks of one request")
    axes.set_ylim(bottom=0)
    axes.legend(title="clip", fontsize=7)
    return figure


def _ratios(report: Report) -> dict[str, float]:
    ratios = {}
    for target in report.targets:
        ratio = target.body.get("keep_ratio", 1.0 if target.name in ("stock", "none") else None)
        if ratio is not None:
            ratios[target.name] = float(ratio)
    return ratios


def time_lines(report: Report) -> Figure | None:
    """Requests and KV use along the last run of each target at the heaviest load."""
    chosen: dict[str, Run] = {}
    for run in report.runs:
        before = chosen.get(run.target)
        if run.answers and (before is None or run.load.value >= before.load.value):
            chosen[run.target] = run
    if not chosen:
        return None
    figure = Figure(figsize=(8, 2.2 * len(chosen)), layout="constrained")
    grid = figure.subplots(len(chosen), 1, squeeze=False)
    for axes, run in zip(grid[:, 0], chosen.values(), strict=True):
        _time_line(axes, run)
    grid[-1, 0].set_xlabel("s since the start of the run")
    return figure


def _time_line(axes: Axes, run: Run) -> None:
    for row, answer in enumerate(sorted(run.answers, key=lambda a: a.sent_s)):
        end = answer.ended_s if answer.ended_s is not None else run.wall_s
        first = answer.chunk_s[0] if answer.chunk_s else end
        colour = "tab:red" if answer.status in ("error", "incomplete") else "tab:blue"
        axes.barh(row, first - answer.sent_s, left=answer.sent_s, color=colour, alpha=0.4)
        axes.barh(row, end - first, left=first, color=colour)
    axes.set_ylabel("request")
    axes.set_title(
        f"{run.target}, {run.media}, {run.load.label}: light until the first token", fontsize=8
    )
    points = [(s.at_s, 100 * s.kv_use) for s in run.samples if s.kv_use is not None]
    if points:
        other = axes.twinx()
        other.plot(*zip(*points, strict=True), color="tab:orange", linewidth=1)
        other.set_ylim(bottom=0)
        other.set_ylabel("KV use, %", color="tab:orange")


def stages(grouped: dict[Cell, list[Run]]) -> Figure | None:
    """Mean time of a request by stage, at the lightest load of each target."""
    bars: dict[str, dict[str, float]] = {}
    for (target, media, seconds, load), runs in grouped.items():
        names = list(dict.fromkeys(name for run in runs for name in run.figures["stages_s"]))
        if names and not any(label.startswith(f"{target}\n{media}") for label in bars):
            bars[f"{target}\n{media}\n{seconds:g} s, {load}"] = {
                name: float(np.mean([run.figures["stages_s"].get(name, 0.0) for run in runs]))
                for name in names
            }
    if not bars:
        return None
    figure = Figure(figsize=(max(6.0, 1.3 * len(bars)), 4))
    axes = figure.subplots()
    bottom = np.zeros(len(bars))
    for name in sorted({name for parts in bars.values() for name in parts}, key=_stage_order):
        heights = np.array([parts.get(name, 0.0) for parts in bars.values()])
        axes.bar(list(bars), heights, bottom=bottom, label=name)
        bottom += heights
    axes.set_ylabel("s of a request, mean")
    axes.legend(fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    return figure


def _stage_order(stage: str) -> int:
    """Sort key of stages; unknown ones are of the API process and come first."""
    return ORDER.index(stage) if stage in ORDER else -1


def clip_length(grouped: dict[Cell, list[Run]]) -> Figure | None:
    """Time to first token and memory against clip length, with linear fits."""
    if len({cell[2] for cell in grouped}) < 2:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    pair = figure.subplots(1, 2)
    for axes, what, label, unit in (
        (pair[0], first_token, "time to first token, median, s", 1.0),
        (pair[1], memory, "peak memory of the server, GiB", GIB),
    ):
        for name, points in fits(grouped, what).items():
            x, y = np.array(points).T
            (line,) = axes.plot(x, y / unit, "o", label=name)
            slope, start = np.polyfit(x, y / unit, 1)
            axes.plot(x, slope * x + start, "--", linewidth=1, color=line.get_color())
        axes.set(xlabel="clip, s", ylabel=label)
        if axes.lines:  # the memory of a remote server is not known
            axes.legend(fontsize=7)
    return figure


def fits(grouped: dict[Cell, list[Run]], figure: Measure) -> dict[str, list[tuple[float, float]]]:
    """Points (seconds, value) by target, media and load, where there are at least two."""
    points: dict[str, list[tuple[float, float]]] = {}
    for (target, media, seconds, load), runs in grouped.items():
        value = _mean(runs, figure)
        if np.isfinite(value):
            points.setdefault(f"{target}, {media}, {load}", []).append((seconds, value))
    return {name: sorted(found) for name, found in points.items() if len(found) > 1}
