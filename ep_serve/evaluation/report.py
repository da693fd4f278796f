"""Write the report: a self-contained HTML page, and the figures as JSON."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from ep_serve.evaluation.chart import chart
from ep_serve.evaluation.errors import EvaluationError
from ep_serve.evaluation.figures import ALL, Figures, PlacementShares, Setting, Summary, summarise
from ep_serve.evaluation.results import Row
from ep_serve.evaluation.statistics import RESAMPLES, Estimate

JSON_NAME = "report.json"
PAGE_NAME = "report.html"
NONE = "-"

Column = tuple[str, Callable[[Figures], str]]
ByName = Mapping[str, Mapping[Setting, Figures]]


def write(rows: Sequence[Row], folder: Path) -> Path:
    """Write `report.json` and `report.html`; returns the page's path.

    Raises:
        EvaluationError: There are no results.
    """
    if not rows:
        raise EvaluationError("there are no results to report")
    summary = summarise(rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON_NAME).write_text(json.dumps(as_json(summary), indent=1) + "\n", encoding="utf-8")
    path = folder / PAGE_NAME
    path.write_text(page(summary), encoding="utf-8")
    return path


def as_json(summary: Summary) -> dict[str, Any]:
    """All figures as JSON values; a list entry for each server and keep ratio."""

    def entries(figures: Mapping[Setting, Figures]) -> list[dict[str, Any]]:
        return [
            {"server": server, "keep_ratio": ratio, **asdict(one)}
            for (server, ratio), one in figures.items()
        ]

    return {
        "questions": summary.questions,
        "clips": summary.clips,
        "errors": summary.errors,
        "tasks": {task: entries(figures) for task, figures in summary.tasks.items()},
        "groups": {
            name: {value: entries(figures) for value, figures in values.items()}
            for name, values in summary.groups.items()
        },
    }


def page(summary: Summary) -> str:
    """The HTML."""
    style = resources.files(__package__).joinpath("page", "report.css").read_text("utf-8")
    head = (
        '<meta charset="utf-8"><title>Evaluation</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{style}</style>'
    )
    intro = (
        f"<h1>Evaluation</h1><p>{summary.questions} questions about {summary.clips} clips. "
        "Brackets hold 95 % intervals: Wilson's for accuracies; for ratios those of "
        f"{RESAMPLES} draws of clips with replacement, each with all its questions and the answers "
        "at both keep ratios. <em>Without picture</em>, <em>sound</em> or <em>both</em>: guesses "
        "with perfect perception of the rest and the statistics of the questions. Times "
        "are those of this client, with what the server remembers of a clip.</p>"
    )
    parts = [intro, *_errors(summary), _overview(summary), _charts(summary)]
    parts.append(_by_name("Accuracy by task, %", summary.tasks, summary.settings, _accuracy))
    if any(one.relative for figures in summary.tasks.values() for one in figures.values()):
        heading = "Accuracy over that at keep ratio 1, %"
        fewer = [setting for setting in summary.settings if setting[1] < 1]
        parts.append(_by_name(heading, summary.tasks, fewer, _relative, guesses=False))
    parts += [_placement(summary), *_groups(summary)]
    return (
        f'<!doctype html><html lang="en"><head>{head}</head>'
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _errors(summary: Summary) -> list[str]:
    if not summary.errors:
        return []
    items = "".join(
        f"<li>{count}: {html.escape(message)}</li>" for message, count in summary.errors.items()
    )
    total = sum(summary.errors.values())
    words = f"{total} questions failed. They are in no figure; the same command retries them."
    return [f'<div class="warning" role="note"><p>{words}</p><ul>{items}</ul></div>']


def _overview(summary: Summary) -> str:
    figures = summary.tasks[ALL]
    guesses = list(dict.fromkeys(name for one in figures.values() for name in one.guesses))
    columns: list[Column] = [
        ("answers", lambda one: str(one.answers)),
        ("errors", lambda one: str(one.errors)),
        ("accuracy, %", _accuracy),
        ("of keep ratio 1, %", _relative),
        ("prompt tokens, full", lambda one: _number(one.tokens_full)),
        ("kept", lambda one: _number(one.tokens_kept)),
        ("sound among kept, %", lambda one: _percent(one.audio_share)),
        ("seconds", lambda one: _number(one.seconds, 2)),
        *((f"guess {name}, %", _guess(name)) for name in guesses),
    ]
    return _table("Overview", figures, columns)


def _charts(summary: Summary) -> str:
    names = {ALL: "All questions"}
    drawn = [chart(names.get(task, task), figures) for task, figures in summary.tasks.items()]
    return f'<h2>Accuracy against tokens</h2><div class="charts">{"".join(drawn)}</div>'


def _by_name(
    title: str,
    figures: ByName,
    settings: Sequence[Setting],
    cell: Callable[[Figures], str],
    *,
    guesses: bool = True,
) -> str:
    """A table with a column for each task or group, and a row for each setting and guesser."""
    heads = ["server", "keep ratio", *figures]
    rows = [
        [
            *(server, f"{ratio:g}"),
            *(
                cell(by[server, ratio]) if (server, ratio) in by else NONE
                for by in figures.values()
            ),
        ]
        for server, ratio in settings
    ]
    if guesses:
        first = [next(iter(by.values())) for by in figures.values()]
        names = dict.fromkeys(name for one in first for name in one.guesses)
        rows += [["guess", name, *(_guess(name)(one) for one in first)] for name in names]
        rows.append(["questions", "", *(str(one.answers + one.errors) for one in first)])
    return _html_table(title, heads, rows)


def _placement(summary: Summary) -> str:
    """Where the kept tokens lie, by task; empty without selections."""
    heads = [
        *("task", "server", "keep ratio", "questions"),
        *("in the asked seconds, %", "by chance", "times chance"),
        *("on the evidence, %", "by chance", "times chance", "sound among kept, %"),
    ]
    rows = [
        [task, server, f"{ratio:g}", *_where(one.where), _percent(one.audio_share)]
        for task, figures in summary.tasks.items()
        for (server, ratio), one in figures.items()
        if one.where and ratio < 1
    ]
    if not rows:
        return ""
    note = (
        "<p>Means over questions. The asked seconds are those in which the answer is shown or "
        "heard; evidence is the picture where it is shown and the sound where it is heard. Chance "
        "is their share of all tokens.</p>"
    )
    return _html_table("Where the kept tokens lie", heads, rows, note)


def _where(found: PlacementShares) -> list[str]:
    cells = [str(found.questions)]
    for share, chance in (
        (found.then, found.then_chance),
        (found.evidence, found.evidence_chance),
    ):
        times = NONE if not chance else f"{share / chance:.1f}"
        cells += [_percent(share), _percent(chance), times]
    return cells


def _groups(summary: Summary) -> list[str]:
    parts = []
    for name, values in summary.groups.items():
        rows = [
            [value, str(next(iter(figures.values())).answers)]
            + [_accuracy(figures[s]) if s in figures else NONE for s in summary.settings]
            + [_guess(guess)(next(iter(figures.values()))) for guess in _guess_names(values)]
            for value, figures in values.items()
        ]
        heads = [name, "answers", *(f"{server}, {ratio:g}" for server, ratio in summary.settings)]
        heads += [f"guess {guess}" for guess in _guess_names(values)]
        parts.append(_html_table(f"Accuracy by {name}, %", heads, rows))
    return parts


def _guess_names(values: ByName) -> list[str]:
    """Names of all guessers."""
    every = (one for figures in values.values() for one in figures.values())
    return list(dict.fromkeys(name for one in every for name in one.guesses))


def _table(title: str, figures: Mapping[Setting, Figures], columns: Sequence[Column]) -> str:
    heads = ["server", "keep ratio", *(name for name, _ in columns)]
    rows = [
        [server, f"{ratio:g}", *(cell(one) for _, cell in columns)]
        for (server, ratio), one in figures.items()
    ]
    return _html_table(title, heads, rows)


def _html_table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        first = '<th scope="row">' if tag == "td" else '<th scope="col">'
        rest = f'<{tag} scope="col">' if tag == "th" else "<td>"
        names = [f"{first}{html.escape(cells[0])}</th>"]
        return (
            f"<tr>{''.join([*names, *(f'{rest}{html.escape(c)}</{tag}>' for c in cells[1:])])}</tr>"
        )

    label = html.escape(title, quote=True)
    body = "".join(row(cells, "td") for cells in rows)
    return (
        f"<h2>{html.escape(title)}</h2>{note}"
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}">'
        f"<table><thead>{row(heads, 'th')}</thead><tbody>{body}</tbody></table></div>"
    )


def _accuracy(one: Figures) -> str:
    return _estimate(one.accuracy)


def _relative(one: Figures) -> str:
    return _estimate(one.relative)


def _guess(name: str) -> Callable[[Figures], str]:
    return lambda one: _percent(one.guesses.get(name))


def _estimate(one: Estimate | None) -> str:
    if one is None:
        return NONE
    return f"{100 * one.value:.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}"


def _number(value: float | None, digits: int = 0) -> str:
    return NONE if value is None else f"{value:.{digits}f}"
