"""Run all questions on all servers at all keep ratios, resumably."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ep_serve.evaluation.client import RequestError, Server
from ep_serve.evaluation.errors import EvaluationError
from ep_serve.evaluation.evidence import count_placement
from ep_serve.evaluation.grading import is_correct
from ep_serve.evaluation.questions import Question, find_missing_media
from ep_serve.evaluation.results import (
    RESULTS_NAME,
    Key,
    ResultsWriter,
    Row,
    TokenCounts,
    read_rows,
)

MAX_CONSECUTIVE_FAILURES = 12
"""Consecutive failures after which a run stops."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Options of a run.

    Attributes:
        media: Folder of the media paths.
        keep_ratios: Keep ratios of every question.
        concurrency: Requests at a time.
        max_tokens: Maximum tokens of an answer.
        selection: Also request which tokens were kept.
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
    """Run the questions without a result in `folder`, and append to its `results.jsonl`.

    Failed questions of earlier runs are retried.

    Raises:
        EvaluationError: A file is missing, a server refuses all requests, or too many requests
            failed in a row. Results until then are kept.
    """
    if absent := find_missing_media(questions, plan.media):
        raise EvaluationError(f"{len(absent)} files are missing, the first is {absent[0]}")
    path = folder / RESULTS_NAME
    with ResultsWriter(path) as writer:
        known = {row.key: row for row in read_rows([path])}
        jobs = list(_jobs(questions, servers, plan))
        open_jobs = [job for job in jobs if not _is_done(job, known.get(job.key), plan)]
        bar = tqdm(total=len(jobs), initial=len(jobs) - len(open_jobs), desc="eval", unit="answer")
        with bar:
            _run_jobs(open_jobs, plan, writer, bar)


def _jobs(questions: Sequence[Question], servers: Sequence[Server], plan: Plan) -> Iterator[Job]:
    """All jobs by server, those of a clip consecutively so that it is decoded once.

    The first request of a clip includes decoding, so the first keep ratio rotates.
    """
    for server in servers:
        for number, question in enumerate(questions):
            first = number % len(plan.keep_ratios)
            for ratio in (*plan.keep_ratios[first:], *plan.keep_ratios[:first]):
                yield Job(server, ratio, question)


def _is_done(job: Job, row: Row | None, plan: Plan) -> bool:
    if row is None or row.error is not None or row.digest != job.question.digest:
        return False
    needs_placement = (
        plan.selection and job.question.meta.evidence is not None and row.tokens is not None
    )
    return row.placement is not None or not needs_placement


def _run_jobs(jobs: Sequence[Job], plan: Plan, writer: ResultsWriter, bar: tqdm[None]) -> None:
    consecutive = failures = 0
    pool = ThreadPoolExecutor(plan.concurrency)
    try:
        for future in as_completed([pool.submit(_run_job, job, plan) for job in jobs]):
            row = future.result()
            writer.append(row)
            bar.update()
            consecutive = consecutive + 1 if row.error else 0
            failures += row.error is not None
            if failures:
                bar.set_postfix(failed=failures)
            if consecutive >= MAX_CONSECUTIVE_FAILURES:
                raise EvaluationError(
                    f"{consecutive} requests failed in a row, the last: {row.error}"
                )
    finally:
        pool.shutdown(cancel_futures=True)


def _run_job(job: Job, plan: Plan) -> Row:
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
        answer = job.server.complete(
            [plan.media / name for name in question.media],
            question.prompt,
            job.keep_ratio,
            max_tokens=plan.max_tokens,
            selection=evidence is not None,
        )
    except RequestError as error:
        if error.is_fatal:
            raise EvaluationError(f"{job.server.url}: {error}") from None
        return row.model_copy(update={"error": str(error)})
    row.got = answer.text
    row.right = is_correct(answer.text, question.right, question.options)
    row.seconds = round(answer.seconds, 4)
    if answer.reduction:
        row.tokens = TokenCounts.from_reduction(answer.reduction)
        if evidence and "selection" in answer.reduction:
            row.placement = count_placement(answer.reduction["selection"], evidence)
    return row


def _guesses(question: Question) -> dict[str, float]:
    """{guesser: probability that it is right}."""
    guesses = {
        f"without {missing}": float(is_correct(guess, question.right, question.options))
        for missing, guess in question.meta.guesses.items()
    }
    if question.options:
        guesses["any option"] = 1 / len(question.options)
    return guesses
