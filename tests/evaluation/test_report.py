from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ep_serve.evaluation.errors import EvaluationError
from ep_serve.evaluation.evidence import Placement
from ep_serve.evaluation.report import JSON_NAME, write
from ep_serve.evaluation.results import Row, TokenCounts
from tests.evaluation import pages


def row(number: int, ratio: float, right: bool | None, server: str = "ours", **more: Any) -> Row:
    """Questions 0 to 3 are about clip 0, 4 to 7 about clip 1, and so on."""
    kept = int(100 * ratio)
    return Row(
        server=server,
        keep_ratio=ratio,
        id=f"q{number}",
        clip=f"{number // 4}.mp4",
        digest="",
        task="seen" if number % 2 else "cross",
        question="?",
        answer="red",
        guesses={"without picture": float(number % 2 == 0), "any option": 0.25},
        groups={"seconds": str(4 + number // 4), "seed": str(number)},
        right=right,
        seconds=0.5,
        tokens=TokenCounts(
            prompt_full=120,
            prompt_kept=kept + 20,
            av_full=100,
            av_kept=kept,
            audio_full=40,
            audio_kept=kept // 2,
        ),
        **more,
    )


def rows() -> list[Row]:
    """40 questions: all right with all tokens, four of five with a tenth of them."""
    whole = [row(number, 1.0, True) for number in range(40)]
    placement = Placement(
        kept=10, kept_then=8, kept_evidence=6, full=100, full_then=20, full_evidence=5
    )
    return whole + [row(n, 0.1, n % 5 > 0, placement=placement) for n in range(40)]


def figures(folder: Path, *path: str) -> Any:
    """A part of the report: a list with an entry for each server and keep ratio, or several."""
    found = json.loads((folder / JSON_NAME).read_text())
    for name in path:
        found = found[name]
    return found


def test_accuracy_comes_with_its_interval_and_the_ratio_to_all_tokens(tmp_path: Path) -> None:
    write(rows(), tmp_path)
    whole, tenth = figures(tmp_path, "tasks", "all")
    assert (whole["keep_ratio"], tenth["keep_ratio"]) == (1.0, 0.1)
    assert whole["accuracy"]["value"] == 1.0
    assert whole["relative"] is None
    assert tenth["accuracy"] == pytest.approx(
        {"value": 0.8, "low": 0.6524, "high": 0.895}, abs=1e-4
    )
    assert tenth["relative"]["value"] == 0.8
    assert tenth["relative"]["low"] < 0.8 < tenth["relative"]["high"]
    assert (tenth["tokens_full"], tenth["tokens_kept"], tenth["audio_share"]) == (120, 30, 0.5)


def test_tasks_and_groups_have_figures_of_their_own(tmp_path: Path) -> None:
    write(rows(), tmp_path)
    assert list(figures(tmp_path, "tasks")) == ["all", "cross", "seen"]
    assert figures(tmp_path, "tasks", "cross")[0]["guesses"]["without picture"] == 1.0
    assert figures(tmp_path, "tasks", "seen")[0]["guesses"] == {
        "without picture": 0.0,
        "any option": 0.25,
    }
    groups = figures(tmp_path, "groups")
    assert list(groups) == ["seconds"], "what is another value for each question is no group"
    assert list(figures(tmp_path, "groups", "seconds")) == [str(n) for n in range(4, 14)]


def test_errors_are_counted_apart(tmp_path: Path) -> None:
    failed = row(40, 0.1, None, error="HTTP 500: <no>")
    page = pages.read(write([*rows(), failed], tmp_path))
    _, tenth = figures(tmp_path, "tasks", "all")
    assert (tenth["answers"], tenth["errors"], tenth["accuracy"]["value"]) == (40, 1, 0.8)
    assert "1: HTTP 500: <no>" in page.text


def test_only_questions_that_both_answered_are_compared(tmp_path: Path) -> None:
    some = [row(0, 1.0, True), row(1, 1.0, None, error="no"), row(0, 0.1, True), row(1, 0.1, False)]
    write(some, tmp_path)
    _, tenth = figures(tmp_path, "tasks", "all")
    assert (tenth["accuracy"]["value"], tenth["relative"]["value"]) == (0.5, 1.0)


def test_placement_is_reported_with_its_expected_share(tmp_path: Path) -> None:
    page = pages.read(write(rows(), tmp_path))
    _, tenth = figures(tmp_path, "tasks", "all")
    assert tenth["where"] == {
        "then": 0.8,
        "then_chance": 0.2,
        "evidence": 0.6,
        "evidence_chance": 0.05,
        "questions": 40,
    }
    assert "Where the kept tokens lie" in page.text


def test_the_page_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    theirs = [row(n, 0.1, n % 2 == 0, server="<uniform>") for n in range(40)]
    page = pages.read(write([*rows(), *theirs], tmp_path))
    assert page.loads() == []
    assert "80.0 [65.2, 89.5]" in page.text
    assert "<uniform>" in page.text
    drawings = page.all("svg")
    assert len(drawings) == 3
    assert all(drawing["role"] == "img" for drawing in drawings)
    assert "ours: 100.0 % with 120 tokens, 80.0 % with 30 tokens" in drawings[0]["aria-label"]


def test_without_results_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no results"):
        write([], tmp_path)


def test_a_server_that_reduces_nothing_has_no_tokens(tmp_path: Path) -> None:
    page = pages.read(write([row(0, 1.0, True).model_copy(update={"tokens": None})], tmp_path))
    assert "Overview" in page.text
    assert page.all("svg") == []
