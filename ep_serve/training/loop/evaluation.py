"""Evaluate the trained model on questions about held-out clips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ep_serve.layout import Kind
from ep_serve.scenes.guessing import SceneQuestion, guess_accuracy
from ep_serve.scenes.questions import make_random_question
from ep_serve.training.data.examples import LabelledExample, collate_labelled
from ep_serve.training.loop.language import (
    KEEP_RATIOS,
    MAX_QUESTIONS,
    ONE_TOKEN,
    QuestionSampler,
    TrainingModel,
    exact_matches,
)

SPANS = ((4, 8), (9, 12), (13, 30))
"""Seconds of the clips by which the report is divided: from, to."""


@dataclass(frozen=True, slots=True)
class AnswerResult:
    """The answer to one question at one keep ratio."""

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
        """The task that the question belongs to."""
        return self.kind.split("-")[0]


@torch.inference_mode()
def evaluate(
    model: TrainingModel,
    examples: Sequence[LabelledExample],
    keep_ratios: Sequence[float] = KEEP_RATIOS,
) -> list[AnswerResult]:
    """Answer held-out questions greedily; an answer is right if all its tokens are."""
    model.eval()
    results = []
    ordered = sorted(examples, key=lambda one: one.example.layout.length)
    for first in range(0, len(ordered), MAX_QUESTIONS):
        batch_examples = ordered[first : first + MAX_QUESTIONS]
        refined = model.thinker.refine(
            collate_labelled(batch_examples, [1.0] * len(batch_examples)).batch
        )
        for ratio in keep_ratios:
            batch = collate_labelled(batch_examples, [ratio] * len(batch_examples))
            output = model.thinker.answer(batch.batch, refined)
            right = exact_matches(output, batch)
            for row, one in enumerate(batch_examples):
                is_av = batch.batch.is_av[row]
                kept = output.kept[row][is_av].numpy()
                evidence = np.asarray(one.evidence.any(axis=0))
                sound = batch.batch.kinds[row][is_av].numpy() == Kind.AUDIO
                results.append(
                    AnswerResult(
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
    model.train()
    return results


def held_out_questions(
    sampler: QuestionSampler, each: int = 4, seed: int = 7
) -> list[LabelledExample]:
    """Sample `each` questions about each clip; the same seed gives the same ones."""
    rng = np.random.default_rng(seed)
    return [sampler.build_example(clip, rng) for clip in sampler.clips() for _ in range(each)]


def guesses(
    known: QuestionSampler, asked: Iterable[LabelledExample], each: int = 4
) -> dict[str, dict[str, float]]:
    """Accuracy of guessing: {missing modality: {task or "all": share}}.

    Args:
        known: Clips with which the guessers are fitted.
        asked: Questions to guess.
        each: Questions about each of the known clips.
    """
    rng = np.random.default_rng(8)
    examples: list[SceneQuestion] = [
        (clip.scene, make_random_question(clip.scene, rng))
        for clip in known.clips()
        for _ in range(each)
    ]
    return guess_accuracy(examples, [(one.scene, one.question) for one in asked])


def summarize(results: Sequence[AnswerResult]) -> dict[str, Any]:
    """Shares of right answers, and where the kept tokens lie.

    Returns:
        {"tasks": {task or "all": {keep ratio: figures}}, "seconds": {span: the same}}.
    """
    spans = {
        f"{low}-{high}": [v for v in results if low <= v.seconds <= high] for low, high in SPANS
    }
    return {
        "tasks": _by_task(results),
        "seconds": {name: _by_task(own) for name, own in spans.items() if own},
    }


def _by_task(results: Sequence[AnswerResult]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for task in (*sorted({v.task for v in results}), "all"):
        own = [v for v in results if task in ("all", v.task)]
        report[task] = {
            _ratio_name(ratio): _mean([v for v in own if v.keep_ratio == ratio])
            for ratio in sorted({v.keep_ratio for v in own}, reverse=True)
        }
    return report


def _ratio_name(ratio: float) -> str:
    return "one token" if ratio == ONE_TOKEN else f"{ratio:g}"


def _mean(results: Sequence[AnswerResult]) -> dict[str, float]:
    shown = ("right", "kept_evidence", "evidence", "kept", "pool", "audio_share")
    rows = [asdict(v) for v in results]
    means = {name: round(float(np.mean([row[name] for row in rows])), 4) for name in shown}
    return {"questions": len(results), **means}
