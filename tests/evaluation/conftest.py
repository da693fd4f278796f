from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.mock_server import MockServer, serving

EVIDENCE = {"video": [[0.0, 1.0]], "audio": [[0.2, 0.6]]}

Lines = list[dict[str, Any]]
MakeData = Callable[[Lines], Path]


@pytest.fixture
def mock() -> Iterator[MockServer]:
    with serving(MockServer()) as server:
        yield server


@pytest.fixture
def make_data(tmp_path: Path) -> MakeData:
    """Writes a benchmark of some lines beside the files that they name; returns its path."""

    def write(lines: Lines) -> Path:
        for line in lines:
            (tmp_path / line["media"]).write_bytes(line["media"].encode())
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        return path

    return write


def lines(count: int = 4) -> Lines:
    """Questions about two clips; the answer to all of them is "red"."""
    return [
        {
            "id": f"q{number}",
            "media": f"{number % 2}.mp4",
            "question": f"Which colour, {number}?",
            "answer": "red",
            "task": "seen" if number < 2 else "cross",
            "meta": {
                "seconds": 4 + number % 2,
                "guesses": {"both": "red" if number == 0 else "blue"},
                "evidence": EVIDENCE,
            },
        }
        for number in range(count)
    ]
