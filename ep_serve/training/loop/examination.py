"""The examination: questions about clips that no training has seen, and the report of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ep_serve.layout import Kind
from ep_serve.scenes.guessing import Asked, guessed_right
from ep_serve.scenes.questions import ask_any
from ep_serve.training.data.examples import Lesson, collate_lessons
from ep_serve.training.loop.language import (
    KEEP_RATIOS,
    MOST,
    ONE_TOKEN,
    Lessons,
    Student,
    all_right,
)

SPANS = ((4, 8), (9, 12), (13, 30))
"""Seconds of the clips by which the report is divided: from, to."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one question was answered at one keep ratio."""

    kind: str
    seconds: int
    """Length of the clip."""
    keep_ratio: float
    right: bool
    kept_evidence: float
    """Share of the kept tokens that are evidence."""
    evidence: float
    """Share of the pool that is evidence: what `kept_evidence` would be by chance."""
    kept: int
    """AV tokens that were kept."""
    pool: int
    """AV tokens of the prompt."""
    audio_share: float
    """Share of the kept tokens that are sound."""

    @property
    def task(self) -> str:
        """What kind of knowledge it took."""
        return self.kind.split("-")[0]


@torch.inference_mode()
def examine(
    student: Student, lessons: Sequence[Lesson], keep_ratios: Sequence[float] = KEEP_RATIOS
) -> list[Verdict]:
    """Ask held-out questions; an answer is right if all its tokens are the likeliest ones."""
    student.eval()
    verdicts = []
    ordered = sorted(lessons, key=lambda one: one.example.layout.length)
    for first in range(0, len(ordered), MOST):
        some = ordered[first : first + MOST]
        refined = student.thinker.refine(collate_lessons(some, [1.0] * len(some)).batch)
        for ratio in keep_ratios:
            batch = collate_lessons(some, [ratio] * len(some))
            output = student.thinker.answer(batch.batch, refined)
            right = all_right(output, batch)
            for row, one in enumerate(some):
                is_av = batch.batch.is_av[row]
                kept = output.kept[row][is_av].numpy()
                evidence = np.asarray(one.evidence.any(axis=0))
                sound = batch.batch.kinds[row][is_av].numpy() == Kind.AUDIO
                verdicts.append(
                    Verdict(
                        kind=one.question.kind,
                        seconds=one.scene.seconds,
                        keep_ratio=ratio,
                        right=right[row],
                        kept_evidence=float(evidence[kept].mean()),
                        evidence=float(evidence.mean()),
                        kept=int(kept.sum()),
                        pool=kept.size,
                        audio_share=float(sound[kept].mean()),
                    )
                )
    student.train()
    return verdicts


def held_out_questions(lessons: Lessons, each: int = 4, seed: int = 7) -> list[Lesson]:
    """A few questions about each clip, always the same ones."""
    rng = np.random.default_rng(seed)
    return [lessons.lesson(clip, rng) for clip in lessons.clips() for _ in range(each)]


def guesses(known: Lessons, asked: Iterable[Lesson], each: int = 4) -> dict[str, dict[str, float]]:
    """What guessing gets right: {what is missing: {task or "all": share}}.

    Args:
        known: Clips from which the guessers learn what is likely.
        asked: What they guess.
        each: Questions about each of the known clips.
    """
    rng = np.random.default_rng(8)
    examples: list[Asked] = [
        (clip.scene, ask_any(clip.scene, rng)) for clip in known.clips() for _ in range(each)
    ]
    return guessed_right(examples, [(one.scene, one.question) for one in asked])


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Shares of right answers, and where the kept tokens lie.

    Returns:
        {"tasks": {task or "all": {keep ratio: figures}}, "seconds": {span: the same}}.
    """
    spans = {
        f"{low}-{high}": [v for v in verdicts if low <= v.seconds <= high] for low, high in SPANS
    }
    return {
        "tasks": _by_task(verdicts),
        "seconds": {name: _by_task(own) for name, own in spans.items() if own},
    }


def _by_task(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for task in (*sorted({v.task for v in verdicts}), "all"):
        own = [v for v in verdicts if task in ("all", v.task)]
        report[task] = {
            _ratio_name(ratio): _mean([v for v in own if v.keep_ratio == ratio])
            for ratio in sorted({v.keep_ratio for v in own}, reverse=True)
        }
    return report


def _ratio_name(ratio: float) -> str:
    return "one token" if ratio == ONE_TOKEN else f"{ratio:g}"


def _mean(verdicts: Sequence[Verdict]) -> dict[str, float]:
    shown = ("right", "kept_evidence", "evidence", "kept", "pool", "audio_share")
    rows = [asdict(v) for v in verdicts]
    means = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in shown}
    return {"questions": len(verdicts), **means}
