"""Plot accuracy by token selection, with the bypass open and closed.

Reads the reports that `python -m ep_serve.training embedded --out DIR --variant X` left in DIR for
the variants named below, of all seeds that are there, and writes a PNG. Needs matplotlib, which
`make setup` installs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

TARGET = Path(__file__).parents[1] / "ep_serve" / "training" / "bypass.png"
RATIOS = {"1": "all", "0.2": "20 %", "0.1": "10 %", "0.05": "5 %", "one token": "one"}
SPAN = "4-8"
"""Seconds of the clips that all variants are evaluated on."""
PANELS = {
    "bypass open: the decoder gets refined text": {
        "the scores": "again",
        "evenly spaced": "uniform",
        "chance": "random",
    },
    "bypass closed: the decoder gets text as it came": {
        "the scores": "closed",
        "evenly spaced": "closed-uniform",
        "chance": "closed-random",
    },
}
STYLES: dict[str, dict[str, Any]] = {
    "the scores": {"color": "#0b5cad", "marker": "o"},
    "evenly spaced": {"color": "#c05a00", "marker": "s", "linestyle": "--"},
    "chance": {"color": "#5b5b5b", "marker": "^", "linestyle": ":"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the DIR of --out")
    parser.add_argument("--to", type=Path, default=TARGET, help="the PNG [%(default)s]")
    arguments = parser.parse_args()
    draw(arguments.folder).savefig(arguments.to, dpi=110)


def draw(folder: Path) -> Figure:
    """Both panels, from the reports in a folder."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    pair = figure.subplots(1, 2, sharey=True)
    for axes, (title, selectors) in zip(pair, PANELS.items(), strict=True):
        for selector, variant in selectors.items():
            _line(axes, selector, reports(folder, variant))
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("audio and video tokens that survive")
        axes.set_ylim(0, 100)
        axes.grid(axis="y", alpha=0.3)
    pair[0].set_ylabel("right answers, %")
    guess = 100 * reports(folder, "closed")[0]["guesses"]["both"]["all"]
    for axes in pair:
        axes.axhline(guess, color="black", linewidth=0.8)
        axes.text(0, guess - 2, "best guess without the clip", fontsize=8, va="top")
    pair[1].legend(
        title="selection by",
        fontsize=8,
        title_fontsize=8,
        loc="lower left",
        bbox_to_anchor=(0, 0.36),
    )
    return figure


def reports(folder: Path, variant: str) -> list[dict[str, Any]]:
    """The reports of a variant, one for each seed."""
    found = sorted(folder.glob(f"{variant}-[0-9]*/report.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def shares(report: Mapping[str, Any]) -> list[float]:
    """Right answers in per cent, at each of `RATIOS`."""
    of_all = report["seconds"][SPAN]["all"]
    return [100 * of_all[ratio]["right"] for ratio in RATIOS]


def _line(axes: Axes, selector: str, found: Sequence[Mapping[str, Any]]) -> None:
    """The mean over seeds as a line, each of them as a mark."""
    if not found:
        return
    each = np.array([shares(report) for report in found])
    style = STYLES[selector]
    axes.plot(list(RATIOS.values()), each.mean(0), label=selector, markersize=5, **style)
    for one in each if len(each) > 1 else ():
        axes.plot(list(RATIOS.values()), one, style["marker"], color=style["color"], alpha=0.4)


if __name__ == "__main__":
    main()
