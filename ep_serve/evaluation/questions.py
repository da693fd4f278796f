"""A benchmark as a file: one question a line. The README of this package describes the format."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from ep_serve.evaluation.errors import EvaluationError

_LETTER = re.compile(r"[A-Z]")
CHOICE_INSTRUCTION = "Answer with the letter of the right option."
"""Instruction below the options of a multiple-choice question."""

Span = tuple[float, float]
Text = Annotated[str, Field(min_length=1)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Evidence(BaseModel):
    """Spans (start, end) of the evidence of an answer, in seconds of the first medium."""

    model_config = ConfigDict(extra="forbid")

    video: list[Span] = []
    audio: list[Span] = []

    @property
    def spans(self) -> list[Span]:
        """All spans of both modalities."""
        return [*self.video, *self.audio]


class Meta(BaseModel):
    """Metadata of a question; other scalar values are reported as groups."""

    model_config = ConfigDict(extra="allow")

    evidence: Evidence | None = None
    guesses: dict[str, str] = {}
    """{missing modality: answer of a guesser without it}."""

    @property
    def groups(self) -> dict[str, str]:
        """The scalar values, by which questions are grouped."""
        extra = self.model_extra or {}
        return {name: str(v) for name, v in extra.items() if isinstance(v, str | int | float)}


class Question(BaseModel):
    """One line of a benchmark.

    Attributes:
        id: Unique identifier.
        media: Files, as paths below the benchmark's folder of media.
        question: Text of the question.
        answer: The right answer: a text, or the letter or the text of an option.
        options: {letter: text} of a multiple-choice question.
        task: Kind of question.
        meta: Other metadata.
    """

    model_config = ConfigDict(extra="forbid")

    id: Annotated[Text, BeforeValidator(_as_text)]
    media: Annotated[list[Text], BeforeValidator(_as_list), Field(min_length=1)]
    question: Text
    answer: Annotated[Text, BeforeValidator(_as_text)]
    options: dict[str, Text] = {}
    task: Text = "all"
    meta: Meta = Meta()

    @model_validator(mode="after")
    def _check_options(self) -> Question:
        if bad := [letter for letter in self.options if not _LETTER.fullmatch(letter)]:
            raise ValueError(f"options must be named by letters A to Z, not {bad[0]!r}")
        if self.options and self.answer not in (*self.options, *self.options.values()):
            raise ValueError(f"answer must be one of the options, not {self.answer!r}")
        return self

    @property
    def right(self) -> str:
        """The right answer; with options, its letter."""
        if not self.options or self.answer in self.options:
            return self.answer
        return next(letter for letter, text in self.options.items() if text == self.answer)

    @property
    def prompt(self) -> str:
        """The prompt: question and options."""
        if not self.options:
            return self.question
        lines = [f"{letter}. {text}" for letter, text in sorted(self.options.items())]
        return "\n".join([self.question, *lines, CHOICE_INSTRUCTION])

    @property
    def digest(self) -> str:
        """Hash of the content, to detect changed questions with the same id."""
        asked = json.dumps([self.media, self.prompt, self.answer])
        return hashlib.sha256(asked.encode()).hexdigest()[:12]


def read_questions(path: Path) -> list[Question]:
    """Read a benchmark.

    Raises:
        EvaluationError: A line is invalid; the message names line and field.
        OSError: The file cannot be read.
    """
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            questions.append(Question.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the line"
            raise EvaluationError(f"{path}, line {number}: {where}: {first['msg']}") from None
    twice = [name for name, times in Counter(q.id for q in questions).items() if times > 1]
    if twice:
        raise EvaluationError(f"{path}: the id {twice[0]!r} is on more than one line")
    if not questions:
        raise EvaluationError(f"{path} holds no questions")
    return questions


def find_missing_media(questions: Sequence[Question], folder: Path) -> list[Path]:
    """Media files of the questions that do not exist."""
    named = dict.fromkeys(name for question in questions for name in question.media)
    return [folder / name for name in named if not (folder / name).is_file()]
