"""Asking every question of every server at every keep ratio, and going on after a stop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ep_serve.evaluation.client import NoAnswerError, Server
from ep_serve.evaluation.errors import EvaluationError
from ep_serve.evaluation.evidence import place
from ep_serve.evaluation.marking import is_right
from ep_serve.evaluation.questions import Question, missing_media
from ep_serve.evaluation.results import RESULTS_NAME, Book, Key, Row, Tokens, read_rows

MOST_FAILURES = 12
"""Failures one after the other that stop a run: the server is gone, or no question can work."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How questions are asked.

    Attributes:
        media: Folder from which their paths start.
        keep_ratios: Each question is asked at each of them.
        concurrency: Requests at a time.
        max_tokens: Of an answer.
        selection: Also ask which tokens were kept.
    """

    media: Path
    keep_ratios: Sequence[float]
    concurrency: int = 4
    max_tokens: int = 32
    selection: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """One request."""

    server: Server
    keep_ratio: float
    question: Question

    @property
    def key(self) -> Key:
        return self.server.name, self.keep_ratio, self.question.id


def run(questions: Sequence[Question], servers: Sequence[Server], plan: Plan, folder: Path) -> None:
    """Ask what `folder` does not hold the answer to yet, and write it to `results.jsonl` there.

    What failed in an earlier run is asked again.

    Raises:
        EvaluationError: A file is missing, a server refuses everything, or one failure follows the
            other. What was answered until then stays.
    """
    if absent := missing_media(questions, plan.media):
        raise EvaluationError(f"{len(absent)} files are missing, the first is {absent[0]}")
    path = folder / RESULTS_NAME
    with Book(path) as book:
        known = {row.key: row for row in read_rows([path])}
        jobs = list(_jobs(questions, servers, plan))
        open_jobs = [job for job in jobs if not _is_done(job, known.get(job.key), plan)]
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(open_jobs), desc="eval", unit="answer")
        with bar:
            _ask_all(open_jobs, plan, book, bar)


def _jobs(questions: Sequence[Question], servers: Sequence[Server], plan: Plan) -> Iterator[Job]:
    """Server by server; all that is asked about a clip together, so that it is decoded once.

    Whoever comes first pays for the decoding: that is another keep ratio for each question.
    """
    for server in servers:
        for number, question in enumerate(questions):
            first = number % len(plan.keep_ratios)
            for ratio in (*plan.keep_ratios[first:], *plan.keep_ratios[:first]):
                yield Job(server, ratio, question)


def _is_done(job: Job, row: Row | None, plan: Plan) -> bool:
    if row is None or row.error is not None or row.digest != job.question.digest:
        return False
    wanted = plan.selection and job.question.meta.evidence is not None and row.tokens is not None
    return row.placement is not None or not wanted


def _ask_all(jobs: Sequence[Job], plan: Plan, book: Book, bar: tqdm[None]) -> None:
    in_a_row = failures = 0
    pool = ThreadPoolExecutor(plan.concurrency)
    try:
        for future in as_completed([pool.submit(_ask, job, plan) for job in jobs]):
            row = future.result()
            book.add(row)
            bar.update()
            in_a_row = in_a_row + 1 if row.error else 0
            failures += row.error is not None
            if failures:
                bar.set_postfix(failed=failures)
            if in_a_row >= MOST_FAILURES:
                raise EvaluationError(f"{in_a_row} requests failed in a row, the last: {row.error}")
    finally:
        pool.shutdown(cancel_futures=True)


def _ask(job: Job, plan: Plan) -> Row:
    question = job.question
    row = Row(
        server=job.server.name,
        keep_ratio=job.keep_ratio,
        id=question.id,
        clip=question.media[0],
        digest=question.digest,
        task=question.task,
        question=question.question,
        answer=question.answer,
        guesses=_guesses(question),
        groups=question.meta.groups,
    )
    evidence = question.meta.evidence if plan.selection else None
    try:
        answer = job.server.ask(
            [plan.media / name for name in question.media],
            question.prompt,
            job.keep_ratio,
            max_tokens=plan.max_tokens,
            selection=evidence is not None,
        )
    except NoAnswerError as error:
        if error.hopeless:
            raise EvaluationError(f"{job.server.url}: {error}") from None
        return row.model_copy(update={"error": str(error)})
    row.got = answer.text
    row.right = is_right(answer.text, question.right, question.options)
    row.seconds = round(answer.seconds, 4)
    if answer.reduction:
        row.tokens = Tokens.read(answer.reduction)
        if evidence and "selection" in answer.reduction:
            row.placement = place(answer.reduction["selection"], evidence)
    return row


def _guesses(question: Question) -> dict[str, float]:
    """Who guesses, and how likely they are right."""
    guesses = {
        f"without {missing}": float(is_right(guess, question.right, question.options))
        for missing, guess in question.meta.guesses.items()
    }
    if question.options:
        guesses["any option"] = 1 / len(question.options)
    return guesses
