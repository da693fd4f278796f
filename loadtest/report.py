"""Render a report as a self-contained HTML page and as text."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

import numpy as np

from loadtest.compare import Gain, cells, gains, linear_stage_seconds, memory
from loadtest.compare import first_token as first_token_of
from loadtest.plots import draw, fits
from loadtest.records import Report

JSON_NAME = "report.json"
PAGE_NAME = "report.html"
MIB = 2**20
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 } img { max-width: 100% }
td, th { border: 1px solid #ccc; padding: .2rem .6rem; text-align: right }
td:first-child, th:first-child { text-align: left } pre { white-space: pre-wrap }
.warning { background: #fff3cd; padding: .5rem 1rem }
"""

Table = tuple[str, list[str], list[list[str]]]
"""Title, heads and rows."""


def write(report: Report, folder: Path) -> Path:
    """Write the page, the plots and the JSON; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(report)
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
    report.save(folder / JSON_NAME)
    path = folder / PAGE_NAME
    path.write_text(page(report, pictures), encoding="utf-8")
    return path


def page(report: Report, pictures: dict[str, bytes]) -> str:
    """The HTML."""
    parts = [f"<h1>Load test of {html.escape(report.started)}</h1>"]
    if report.finished is None:
        parts.append(
            '<p class="warning">Interrupted: the report has the measurements until then.</p>'
        )
    parts += [f'<p class="warning">{html.escape(note)}</p>' for note in report.notes]
    for title, heads, rows in tables(report):
        parts.append(f"<h2>{html.escape(title)}</h2>{_html_table(heads, rows)}")
    for name, data in pictures.items():
        source = base64.b64encode(data).decode()
        title = name.removesuffix(".png").replace("_", " ")
        parts.append(f'<h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{source}">')
    details = report.model_dump(include={"command", "machine", "versions", "scenario", "seed"})
    details["servers"] = {target.name: target.command for target in report.targets}
    parts.append(f"<h2>How</h2><pre>{html.escape(json.dumps(details, indent=2))}</pre>")
    head = f'<meta charset="utf-8"><title>Load test</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>"


def text(report: Report) -> str:
    """The tables in Markdown."""
    parts = []
    for title, heads, rows in tables(report):
        lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
        parts.append("\n".join([title, "", *lines, *(f"| {' | '.join(row)} |" for row in rows)]))
    parts += [f"note: {note}" for note in report.notes]
    return "\n\n".join(parts)


def tables(report: Report) -> list[Table]:
    """All tables that have rows."""
    found = [_gains(report), _latencies(report), _server(report), _novelty(report)]
    found += [_searches(report), _lengths(report)]
    return [table for table in found if table[2]]


def _gains(report: Report) -> Table:
    heads = [
        *("what", "TTFT gain", "bound", "gain / bound", "requests/s gain", "bound"),
        "KV blocks gain",
    ]
    rows = [[_cell(gain.cell), *_gain(gain)] for gain in gains(report)]
    return f"Against {report.baseline}, 95 % confidence intervals over repeats", heads, rows


def _gain(gain: Gain) -> list[str]:
    share = gain.share_of_bound()
    return [
        _text(gain.first_token),
        _number(gain.first_token_bound),
        "-" if share is None else f"{100 * share:.0f} %",
        _text(gain.requests),
        _number(gain.requests_bound),
        _text(gain.kv),
    ]


def _latencies(report: Report) -> Table:
    heads = ["what", "TTFT p50", "p90", "p95", "p99", "ITL p50", "TPOT p50", "E2E p50", "E2E p99"]
    heads += ["requests/s", "tokens/s", "goodput/s", "prompt tokens", "whole", "errors"]
    heads += ["incomplete", "cut"]
    rows = []
    for run in report.runs:
        f = run.figures
        row = [f"{_cell(run.cell)} #{run.repeat + 1}{', cut short' if run.interrupted else ''}"]
        row += [_percentile(f["ttft_s"], point) for point in ("p50", "p90", "p95", "p99")]
        row += [_percentile(f[name], "p50") for name in ("itl_s", "tpot_s", "e2e_s")]
        row += [_percentile(f["e2e_s"], "p99")]
        row += [_number(f["requests_per_s"], 3), _number(f["output_tokens_per_s"])]
        row += [_number(f["goodput_per_s"], 3), _number(f["prompt_tokens"], 0), str(f["whole"])]
        row += [
            json.dumps(f["errors"]) if f["errors"] else "0",
            str(f["incomplete"]),
            str(f["cut"]),
        ]
        rows.append(row)
    return "Latencies in seconds, rates, counts", heads, rows


def _server(report: Report) -> Table:
    heads = [
        "what",
        "KV use peak, %",
        "mean, %",
        "KV blocks per request",
        "exact",
        "requests that fit",
    ]
    heads += ["running peak", "waiting peak", "preemptions", "prefix hits, %", "tower hits"]
    heads += ["misses", "event loop > 50 ms late, %", "memory peak, MiB"]
    rows = []
    for run in report.runs:
        s = run.figures["server"]
        percent = [_scaled(s[name], 100) for name in ("kv_use_peak", "kv_use_mean")]
        row = [f"{_cell(run.cell)} #{run.repeat + 1}", *percent]
        row += [_number(s["kv_blocks_per_request"], 1)]
        row += [_number(s[name], 0) for name in ("kv_blocks_exact", "requests_that_fit")]
        row += [_number(s[name], 0) for name in ("running_peak", "waiting_peak", "preemptions")]
        row += [_scaled(s["prefix_cache_hit_share"], 100)]
        row += [_number(s[name], 0) for name in ("tower_cache_hits", "tower_cache_misses")]
        row += [_scaled(s["event_loop_late_share"], 100)]
        row += [_scaled(s["memory_bytes_peak"], 1 / MIB, 0)]
        rows.append(row)
    return "What the server says", heads, rows


def _novelty(report: Report) -> Table:
    """Runs with repeated media, by what is repeated."""
    rows = []
    for cell, runs in cells(report).items():
        if cell[1] != "repeated":
            continue
        found: dict[str, list[float]] = {}
        for answer in (answer for run in runs for answer in run.answers):
            if answer.status == "ok" and answer.ttft_s is not None:
                found.setdefault(answer.novelty, []).append(answer.ttft_s)
        middle = {name: sorted(times)[len(times) // 2] for name, times in found.items()}
        first = middle.get("new")
        rows += [
            [
                f"{_cell(cell)}: {name}",
                str(len(found[name])),
                _number(value, 3),
                _number(value / first if first else None),
            ]
            for name, value in middle.items()
        ]
    return "Repeated media", ["what", "answers", "TTFT median, s", "of a new clip's"], rows


def _searches(report: Report) -> Table:
    rows = []
    for search in report.searches:
        probes = ", ".join(f"{p.concurrency}: {100 * p.attained:.0f} %" for p in search.probes)
        rows.append([f"{search.target}, {search.seconds:g} s", str(search.largest), probes])
    level = ", ".join(f"{name} {value:g}" for name, value in report.level.items() if value)
    heads = ["what", "at a time", "tried: inside the level"]
    return f"Largest concurrency within the service level ({level})", heads, rows


def _lengths(report: Report) -> Table:
    """Linear fits over clip length, and their residuals."""
    rows = []
    for what, figure, unit in (
        ("first token, s", first_token_of, 1.0),
        ("stages beside attention, s", linear_stage_seconds, 1.0),
        ("memory peak, MiB", memory, MIB),
    ):
        for name, points in fits(cells(report), figure).items():
            x, y = np.array(points).T
            y /= unit
            slope, start = np.polyfit(x, y, 1)
            off = np.abs(y - slope * x - start).max() / y.max()
            values = ", ".join(f"{value:.4g}" for value in y)
            rows.append(
                [
                    f"{what}: {name}",
                    values,
                    f"{slope:.4f}",
                    f"{start:.3f}",
                    f"{_scaled(off, 100)} %",
                ]
            )
    lengths = ", ".join(f"{n:g}" for n in sorted({run.seconds for run in report.runs}))
    heads = [
        "what",
        f"at {lengths} s",
        "for each s of clip",
        "at 0",
        "furthest off, of the longest",
    ]
    return "Over clip length, a straight line", heads, rows


def _cell(cell: tuple[str, str, float, str]) -> str:
    target, media, seconds, load = cell
    return f"{target}, {media}, {seconds:g} s, {load}"


def _percentile(values: dict[str, float] | None, name: str) -> str:
    return _number(values[name] if values else None, 3)


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _scaled(value: float | None, factor: float, digits: int = 1) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


def _html_table(heads: list[str], rows: list[list[str]]) -> str:
    def row(cells: list[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

    return f"<table>{row(heads, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
