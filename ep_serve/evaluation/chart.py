"""Plot accuracy against kept tokens as SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from ep_serve.evaluation.figures import Figures, Setting

WIDTH, HEIGHT = 460, 300
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 30, 42
MARKS = ("circle", "square", "diamond", "triangle")
"""Markers of the servers, which differ in more than colour."""
COLOURS = 4
MIN_SPAN = 1.15
"""Minimum factor by which the token axis extends beyond the values."""


def chart(title: str, figures: Mapping[Setting, Figures]) -> str:
    """Plot a line with 95 % intervals for each server, and guesses as dashed lines."""
    servers: dict[str, list[Figures]] = {}
    for (server, _), one in figures.items():
        if one.accuracy is not None and one.tokens_kept:
            servers.setdefault(server, []).append(one)
    points = [one for line in servers.values() for one in line]
    if not points:
        return ""
    axis = _Axis([one.tokens_kept or 1.0 for one in points])
    parts = [_frame(title, axis), _guesses(points[0])]
    for number, (server, line) in enumerate(servers.items()):
        parts.append(_line(number, server, line, axis))
    words = html.escape(_description(title, servers), quote=True)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">'
        f"{''.join(parts)}</svg>"
    )


class _Axis:
    """Tokens on a logarithmic scale."""

    def __init__(self, values: Sequence[float]) -> None:
        self.low = min(values) / MIN_SPAN
        self.high = max(values) * MIN_SPAN

    def x(self, tokens: float) -> float:
        share = math.log(tokens / self.low) / math.log(self.high / self.low)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def ticks(self) -> list[int]:
        """Round numbers, at most about six."""
        ones = [m * 10**power for power in range(7) for m in (1, 2, 5)]
        inside = [value for value in ones if self.low <= value <= self.high]
        return inside if len(inside) > 1 else [round(self.low * MIN_SPAN)]


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">'
        f"{html.escape(words)}</text>"
    )


def _frame(title: str, axis: _Axis) -> str:
    parts = [_text(LEFT, 18, title, "start", "title")]
    for percent in range(0, 101, 20):
        y = _y(percent / 100)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{percent} %", "end"))
    for tokens in axis.ticks():
        x = axis.x(tokens)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(_text(x, HEIGHT - BOTTOM + 16, f"{tokens}"))
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 8, "prompt tokens, mean"))
    return "".join(parts)


def _guesses(figures: Figures) -> str:
    parts = []
    for number, (name, share) in enumerate(figures.guesses.items()):
        y = _y(share)
        parts.append(f'<path class="guess" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        # Labels are side by side, since guesses are often equally good.
        below = 11 if share > 0.1 else -3
        parts.append(_text(WIDTH - RIGHT - 2 - 84 * number, y + below, name, "end", "small"))
    return "".join(parts)


def _line(number: int, server: str, line: Sequence[Figures], axis: _Axis) -> str:
    ordered = sorted(line, key=lambda one: one.tokens_kept or 0)
    places = []
    parts = []
    for one in ordered:
        assert one.accuracy is not None, "points without an accuracy were left out"
        x, y = axis.x(one.tokens_kept or 1.0), _y(one.accuracy.value)
        low, high = _y(one.accuracy.low), _y(one.accuracy.high)
        places.append(f"{x:.1f} {y:.1f}")
        parts.append(f'<path class="bar" d="M{x:.1f} {low:.1f}V{high:.1f}"/>')
        parts.append(_mark(number, x, y))
    parts.append(f'<path class="line" d="M{"L".join(places)}"/>')
    key = LEFT + 12, _y(0) - 10 - 15 * number
    parts.append(_mark(number, *key) + _text(key[0] + 9, key[1] + 4, server, "start"))
    return f'<g class="s{number % COLOURS}">{"".join(parts)}</g>'


def _mark(number: int, x: float, y: float) -> str:
    shape = MARKS[number % len(MARKS)]
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    corners = {
        "square": "-3.5 -3.5 3.5 -3.5 3.5 3.5 -3.5 3.5",
        "diamond": "0 -5 5 0 0 5 -5 0",
        "triangle": "0 -5 4.5 4 -4.5 4",
    }[shape]
    return f'<polygon points="{corners}" transform="translate({x:.1f} {y:.1f})"/>'


def _description(title: str, servers: Mapping[str, Sequence[Figures]]) -> str:
    parts = [
        f"{server}: "
        + ", ".join(
            f"{100 * one.accuracy.value:.1f} % with {one.tokens_kept:.0f} tokens"
            for one in line
            if one.accuracy is not None and one.tokens_kept is not None
        )
        for server, line in servers.items()
    ]
    return f"{title}, accuracy against prompt tokens. {'; '.join(parts)}."
