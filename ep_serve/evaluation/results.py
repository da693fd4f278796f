"""Results of an evaluation: a JSONL file, appended to as answers arrive."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ep_serve.evaluation.errors import EvaluationError
from ep_serve.evaluation.evidence import Placement

RESULTS_NAME = "results.jsonl"
Key = tuple[str, float, str]
"""Server, keep ratio and the question's id."""


class TokenCounts(BaseModel):
    """Token counts of `usage.reduction`: prompt, AV and audio tokens."""

    prompt_full: int
    prompt_kept: int
    av_full: int
    av_kept: int
    audio_full: int
    audio_kept: int

    @classmethod
    def from_reduction(cls, reduction: dict[str, Any]) -> Self:
        return cls(
            prompt_full=reduction["prompt_tokens_full"],
            prompt_kept=reduction["prompt_tokens_reduced"],
            av_full=reduction["av_tokens_full"],
            av_kept=reduction["av_tokens_kept"],
            audio_full=reduction["audio"]["full"],
            audio_kept=reduction["audio"]["kept"],
        )


class Row(BaseModel):
    """One question, asked of one server at one keep ratio.

    Attributes:
        clip: The first medium, by which the bootstrap resamples.
        digest: See `Question.digest`.
        guesses: {guesser: probability that it is right}.
        groups: {name: value}, by which the report groups questions.
        right: None if the request failed.
        error: Why the request failed.
        seconds: From sending the request to the whole answer.
        tokens: None from servers without a reduction.
        placement: Where the kept tokens lie; None if not requested or not known.
    """

    model_config = ConfigDict(extra="forbid")

    server: str
    keep_ratio: float
    id: str
    clip: str
    digest: str
    task: str
    question: str
    answer: str
    guesses: dict[str, float] = {}
    groups: dict[str, str] = {}
    got: str | None = None
    right: bool | None = None
    error: str | None = None
    seconds: float | None = None
    tokens: TokenCounts | None = None
    placement: Placement | None = None

    @property
    def key(self) -> Key:
        return self.server, self.keep_ratio, self.id


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """Rows of files, or of folders that hold `results.jsonl`; the last row of each key counts.

    An incomplete last line is ignored: its writer was interrupted.

    Raises:
        EvaluationError: Another line is not a result.
        OSError: A file cannot be read.
    """
    rows: dict[Key, Row] = {}
    for path in paths:
        file = path / RESULTS_NAME if path.is_dir() else path
        lines = file.read_text(encoding="utf-8").split("\n")
        for number, line in enumerate(lines[:-1], start=1):
            try:
                row = Row.model_validate_json(line)
            except ValidationError as error:
                raise EvaluationError(
                    f"{file}, line {number}: {error.errors()[0]['msg']}"
                ) from None
            rows[row.key] = row
    return list(rows.values())


class ResultsWriter:
    """Appends rows to a file, exclusively.

    Raises:
        EvaluationError: Another process is writing to the file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise EvaluationError(f"another evaluation is writing to {path}") from None
        self._cut_last_line()

    def _cut_last_line(self) -> None:
        self._file.seek(0)
        written = self._file.read()
        self._file.truncate(written.rfind(b"\n") + 1)

    def append(self, row: Row) -> None:
        """Append a row; it is on disk when this returns."""
        self._file.write(row.model_dump_json(exclude_defaults=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
