"""Aggregate results: accuracy, tokens, time and placement by task and group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ep_serve.evaluation.results import Row, TokenCounts
from ep_serve.evaluation.statistics import Estimate, paired_ratio, wilson

ALL = "all"
MAX_GROUPS = 24
"""Maximum number of values of a reported group."""

Setting = tuple[str, float]
"""Server and keep ratio."""


@dataclass(frozen=True, slots=True)
class PlacementShares:
    """Where kept tokens lie, as shares of them; `chance` is the share of all tokens.

    Attributes:
        then: In the spans of the evidence, video or audio.
        evidence: Video tokens in its video spans, and audio tokens in its audio spans.
        questions: Number of questions with evidence.
    """

    then: float
    then_chance: float
    evidence: float
    evidence_chance: float
    questions: int


@dataclass(frozen=True, slots=True)
class Figures:
    """Aggregates over questions for one server at one keep ratio.

    Attributes:
        answers: Number of answers; everything else is about these.
        errors: Number of questions without one.
        accuracy: Share of right answers; None without answers.
        relative: Accuracy over that at keep ratio 1, on the questions that both answered.
        tokens_full, tokens_kept: Mean prompt tokens before and after the reduction.
        av_kept: Mean audio and video tokens that were kept.
        audio_share: Mean share of audio among the kept tokens.
        seconds: Mean latency measured by the client.
        guesses: {guesser: accuracy}.
        where: Where the kept tokens lie.
    """

    answers: int
    errors: int
    accuracy: Estimate | None = None
    relative: Estimate | None = None
    tokens_full: float | None = None
    tokens_kept: float | None = None
    av_kept: float | None = None
    audio_share: float | None = None
    seconds: float | None = None
    guesses: dict[str, float] = field(default_factory=dict)
    where: PlacementShares | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """All figures of some results.

    Attributes:
        settings: Servers and keep ratios, in the order of a report.
        tasks: {task or "all": {setting: figures}}.
        groups: {group: {value: {setting: figures}}}.
        errors: {message: count}.
        clips: Number of clips.
        questions: Number of different questions.
    """

    settings: list[Setting]
    tasks: dict[str, dict[Setting, Figures]]
    groups: dict[str, dict[str, dict[Setting, Figures]]]
    errors: dict[str, int]
    clips: int
    questions: int


def summarise(rows: Sequence[Row]) -> Summary:
    """Compute all figures of a report."""
    settings = sorted({(row.server, row.keep_ratio) for row in rows}, key=lambda s: (s[0], -s[1]))
    tasks = {ALL: _by_setting(rows, settings)}
    if len({row.task for row in rows}) > 1:
        tasks |= _by(rows, [row.task for row in rows], settings)
    names = dict.fromkeys(name for row in rows for name in row.groups)
    groups = {}
    for name in names:
        some = [row for row in rows if name in row.groups]
        if 1 < len({row.groups[name] for row in some}) <= MAX_GROUPS:
            groups[name] = _by(some, [row.groups[name] for row in some], settings)
    errors: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.error is not None:
            errors[row.error] += 1
    return Summary(
        settings=settings,
        tasks=tasks,
        groups=groups,
        errors=dict(sorted(errors.items(), key=lambda item: -item[1])),
        clips=len({row.clip for row in rows}),
        questions=len({row.id for row in rows}),
    )


def _by(
    rows: Sequence[Row], names: Sequence[str], settings: Sequence[Setting]
) -> dict[str, dict[Setting, Figures]]:
    parts: dict[str, list[Row]] = defaultdict(list)
    for row, name in zip(rows, names, strict=True):
        parts[name].append(row)
    return {name: _by_setting(parts[name], settings) for name in sorted(parts, key=_numeric_key)}


def _numeric_key(name: str) -> tuple[float, str]:
    """Sort key: numbers by value, then texts."""
    try:
        return float(name), ""
    except ValueError:
        return float("inf"), name


def _by_setting(rows: Sequence[Row], settings: Sequence[Setting]) -> dict[Setting, Figures]:
    parts: dict[Setting, list[Row]] = defaultdict(list)
    for row in rows:
        parts[row.server, row.keep_ratio].append(row)
    return {
        (server, ratio): _figures(parts[server, ratio], parts.get((server, 1.0), []))
        for server, ratio in settings
        if (server, ratio) in parts
    }


def _figures(rows: Sequence[Row], base: Sequence[Row]) -> Figures:
    answered = [row for row in rows if row.right is not None]
    errors = len(rows) - len(answered)
    if not answered:
        return Figures(answers=0, errors=errors)
    tokens = [row.tokens for row in answered if row.tokens is not None]
    times = [row.seconds for row in answered if row.seconds is not None]
    return Figures(
        answers=len(answered),
        errors=errors,
        accuracy=wilson(sum(row.right is True for row in answered), len(answered)),
        relative=_relative(answered, base),
        tokens_full=_mean([t.prompt_full for t in tokens]),
        tokens_kept=_mean([t.prompt_kept for t in tokens]),
        av_kept=_mean([t.av_kept for t in tokens]),
        audio_share=_audio_share(tokens),
        seconds=_mean(times),
        guesses=_guesses(answered),
        where=_where(answered),
    )


def _relative(rows: Sequence[Row], base: Sequence[Row]) -> Estimate | None:
    known = {row.id: row.right for row in base if row.right is not None}
    paired = [row for row in rows if row.id in known]
    if not paired or paired[0].keep_ratio == 1.0:
        return None
    right = [row.right is True for row in paired]
    return paired_ratio(right, [known[row.id] for row in paired], [row.clip for row in paired])


def _audio_share(tokens: Sequence[TokenCounts]) -> float | None:
    return _mean([t.audio_kept / t.av_kept for t in tokens if t.av_kept and t.audio_full])


def _guesses(rows: Sequence[Row]) -> dict[str, float]:
    """Accuracies of the guessers that have a guess for every question."""
    names = [name for name in rows[0].guesses if all(name in row.guesses for row in rows)]
    return {name: float(np.mean([row.guesses[name] for row in rows])) for name in names}


def _where(rows: Sequence[Row]) -> PlacementShares | None:
    found = [row.placement for row in rows if row.placement is not None and row.placement.kept]
    if not found:
        return None
    return PlacementShares(
        then=float(np.mean([p.kept_then / p.kept for p in found])),
        then_chance=float(np.mean([p.full_then / p.full for p in found])),
        evidence=float(np.mean([p.kept_evidence / p.kept for p in found])),
        evidence_chance=float(np.mean([p.full_evidence / p.full for p in found])),
        questions=len(found),
    )


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
