from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ep_serve.evaluation.errors import EvaluationError
from ep_serve.evaluation.questions import CHOICE_INSTRUCTION, Question, read_questions

PLAIN = {"id": 7, "media": "a.mp4", "question": "What?", "answer": 3}
CHOICE = {**PLAIN, "options": {"A": "a dog", "B": "a cat"}, "answer": "a cat"}


def read(path: Path, *lines: dict[str, Any]) -> list[Question]:
    file = path / "q.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return read_questions(file)


def test_the_shortest_line_is_enough(tmp_path: Path) -> None:
    (question,) = read(tmp_path, PLAIN)
    assert (question.id, question.media, question.right) == ("7", ["a.mp4"], "3")
    assert (question.task, question.prompt) == ("all", "What?")


def test_options_are_part_of_the_prompt(tmp_path: Path) -> None:
    (question,) = read(tmp_path, CHOICE)
    assert question.prompt == f"What?\nA. a dog\nB. a cat\n{CHOICE_INSTRUCTION}"
    assert question.right == "B"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": "a cow"}, "answer must be one of the options"),
        ({"options": {"one": "a cat"}}, "options must be named by letters"),
        ({"media": []}, "media"),
        ({"taks": "seen"}, "taks"),
        ({"meta": {"evidence": {"sight": []}}}, "meta.evidence.sight"),
    ],
)
def test_a_wrong_line_is_named_with_its_field(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(EvaluationError, match=f"line 2.*{words}"):
        read(tmp_path, PLAIN, {**CHOICE, "id": 8, **change})


def test_no_id_comes_twice(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="'7' is on more than one line"):
        read(tmp_path, PLAIN, CHOICE)


def test_another_question_of_the_same_id_has_another_digest(tmp_path: Path) -> None:
    (plain,), (other,) = read(tmp_path, PLAIN), read(tmp_path, {**PLAIN, "answer": 4})
    assert plain.digest != other.digest
