"""Stage three: refiner, score head and decoder learn to answer, on cached tokens.

Three losses: the words of the answer; what goes on in each AV token's own second, told from the
refiner's output (without it nothing is learned in reasonable time); and, lightly, the mass that the
scores put on the tokens the answer rests on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ep_serve.checkpoint.config import load_config, text_config
from ep_serve.scenes.questions import AT_A_GLANCE, BY_EAR, BY_EYE, Question, ask_any
from ep_serve.training.data.examples import (
    NOT_TOLD,
    Lesson,
    LessonBatch,
    Prompts,
    Shown,
    collate_lessons,
    lesson,
    silent,
    sound_alone,
    still,
)
from ep_serve.training.data.labels import ASPECTS, CONTENT
from ep_serve.training.data.store import read_parts
from ep_serve.training.data.token_clip import TokenClip
from ep_serve.training.loop.run import Run
from ep_serve.training.model.thinker import Output, Thinker

KEEP_RATIOS = (1.0, 0.2, 0.1, 0.05)
"""One of them is drawn for each step, from the first one on."""
ONE_TOKEN = 1e-9
"""A keep ratio that keeps a single token of any clip."""
DENSE = 1.0
"""Weight of the dense loss."""
POINTING = 1.0
"""Weight of the loss that points the scores at the evidence."""
TOKENS = 5200
"""AV tokens in a batch of one process, about; long clips make small batches."""
MOST = 16
"""Questions in a batch of one process."""
LONGEST = ((0.15, 5), (0.3, 8), (0.45, 12))
"""Until which share of the steps clips are at most how many seconds long."""
PART_ALONE = 0.04
"""Share of the prompts with a silent clip; as many with a sound alone, and with a picture."""
QUESTION_FIRST = 0.15
"""Share of the prompts in which the question stands before the clip."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What may differ from the shipped model, to see what it is good for.

    Attributes:
        keep_ratios: One of them is drawn for each step; 1 alone trains with all tokens.
        closed: Close the bypass: the decoder gets text unrefined.
        sieve: Who chooses instead of the scores: "uniform" or "random" among the refined tokens,
            "omnisift" without a refiner and with a selector of its own.
        sections: Channels of the rows T, H, W and T again, instead of Sync-RoPE's.
        longest: Seconds of the longest clips; None takes all.
        patience: How many times the steps of other variants.
        anew: Begin with random weights instead of what the shipped model has learned.
    """

    keep_ratios: tuple[float, ...] = KEEP_RATIOS
    closed: bool = False
    sieve: str | None = None
    sections: tuple[int, int, int, int] | None = None
    longest: int | None = None
    patience: int = 1
    anew: bool = False

    @property
    def refines(self) -> bool:
        """Whether the refiner is part of it."""
        return self.sieve != "omnisift"

    @property
    def serves(self) -> bool:
        """Whether a checkpoint can hold it: the rest is the same model, put together otherwise."""
        return self.sieve is None and not self.closed


SHORT_CLIPS = 8
"""Seconds of the longest clips for variants that say who chooses."""
M_ROPE = (8, 12, 12, 0)
"""Qwen2.5-Omni's sections 16, 24, 24 for heads of 128, scaled to heads of 64."""
VARIANTS = {
    "shipped": Variant(),
    # What does not begin anew goes on from the shipped one; "again" is what that is held against.
    "again": Variant(),
    # Neither may begin with what was learned with the other's positions.
    "anew": Variant(patience=5, anew=True),
    "mrope": Variant(sections=M_ROPE, patience=5, anew=True),
    "full": Variant(keep_ratios=(1.0,)),
    "uniform": Variant(sieve="uniform", longest=SHORT_CLIPS),
    "random": Variant(sieve="random", longest=SHORT_CLIPS),
    "closed": Variant(closed=True, longest=SHORT_CLIPS),
    "closed-uniform": Variant(closed=True, sieve="uniform", longest=SHORT_CLIPS),
    "closed-random": Variant(closed=True, sieve="random", longest=SHORT_CLIPS),
    # The shipped decoder has never seen tokens that no refiner has prepared.
    "omnisift": Variant(sieve="omnisift", longest=SHORT_CLIPS, patience=6, anew=True),
}


class Student(nn.Module):
    """The model and what reads the refiner's output during training."""

    def __init__(self, config: Any, variant: Variant) -> None:
        super().__init__()
        self.refines = variant.refines
        self.thinker = Thinker(config, closed=variant.closed, sieve=variant.sieve)
        width = self.thinker.lm_head.in_features
        self.heads = nn.ModuleDict({a: nn.Linear(width, n) for a, n in ASPECTS.items()})
        self.apply(_begin)

    def forward(self, lessons: LessonBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss and its parts, and the share of answers that are right word by word.

        Without a refiner the decoder's states tell what goes on, and no score knows the question.
        """
        output = self.thinker(lessons.batch)
        words = F.cross_entropy(output.logits.float(), lessons.batch.targets)
        dense, told = self._dense(output, lessons)
        loss = words + DENSE * dense
        right = all_right(output, lessons)
        figures = {"words": words.item(), "right": sum(right) / len(right), "dense": dense.item()}
        if self.refines:
            pointing = point(output.scores, lessons)
            loss = loss + POINTING * pointing
            figures["pointing"] = pointing.item()
        figures |= {"loss": loss.item(), **told}
        by_task = defaultdict(list)
        for kind, one in zip(lessons.kinds, right, strict=True):
            by_task[kind].append(float(one))
        return loss, figures | {f"right/{k}": sum(v) / len(v) for k, v in by_task.items()}

    def _dense(self, output: Output, lessons: LessonBatch) -> tuple[Tensor, dict[str, float]]:
        is_av = lessons.batch.is_av
        left = torch.ones_like(is_av) if self.refines else output.kept
        states = (output.refined if self.refines else output.decoded)[is_av & left]
        total = states.new_zeros(())
        told = {}
        for aspect, every in lessons.aspects.items():
            truth = every[left[is_av]]
            logits = self.heads[aspect](states)
            total = total + F.cross_entropy(logits.float(), truth, ignore_index=NOT_TOLD)
            there = truth > 0
            told[f"told/{aspect}"] = (
                (logits.argmax(-1)[there] == truth[there]).float().mean().item()
            )
        return total / len(CONTENT), told


def point(scores: Tensor, lessons: LessonBatch) -> Tensor:
    """The mean of -log(mass of the scores' softmax) over everything that answers rest on."""
    if not len(lessons.rows):
        return scores.new_zeros(())
    own = scores[lessons.rows]
    inside = own.masked_fill(~lessons.evidence, float("-inf"))
    return (own.logsumexp(1) - inside.logsumexp(1)).mean()


class Lessons:
    """Clips to ask about, sorted by length so that batches need little padding."""

    def __init__(self, clips: Iterable[TokenClip], prompts: Prompts) -> None:
        self._prompts = prompts
        self._clips: dict[int, list[TokenClip]] = defaultdict(list)
        for clip in clips:
            self._clips[clip.scene.seconds].append(clip)

    def clips(self) -> Iterator[TokenClip]:
        """All clips, the short ones first."""
        for seconds in sorted(self._clips):
            yield from self._clips[seconds]

    def length(self, rng: np.random.Generator, along: float) -> int:
        """The seconds of the clips of a batch: short ones first, all of them later.

        Batches of long clips hold fewer of them, so they are drawn more often.
        """
        longest = next((most for until, most in LONGEST if along < until), max(self._clips))
        lengths = sorted(n for n in self._clips if n <= longest) or [min(self._clips)]
        seconds = np.array([n * len(self._clips[n]) for n in lengths], dtype=float)
        return int(rng.choice(lengths, p=seconds / seconds.sum()))

    def batch(self, rng: np.random.Generator, seconds: int, keep_ratio: float) -> LessonBatch:
        """Random questions about clips of `seconds`, at one keep ratio.

        With several ratios in a batch, all prompts would be padded to those that are not reduced.
        """
        clips = self._clips[seconds]
        size = max(2, min(MOST, TOKENS // (34 * seconds)))
        lessons = [self.varied(clips[rng.integers(len(clips))], rng) for _ in range(size)]
        return collate_lessons(lessons, [keep_ratio] * size)

    def varied(self, clip: TokenClip, rng: np.random.Generator) -> Lesson:
        """A random question about a clip, now and then about a part of it."""
        part = rng.random()
        if part < 3 * PART_ALONE:
            if part < PART_ALONE:
                shown, question = silent(clip), ask_any(clip.scene, rng, BY_EYE)
            elif part < 2 * PART_ALONE:
                shown, question = sound_alone(clip), ask_any(clip.scene, rng, BY_EAR)
            else:
                shown, question = _glance(clip, rng)
            return lesson(clip, question, self._prompts, shown)
        return self.lesson(clip, rng)

    def lesson(self, clip: TokenClip, rng: np.random.Generator) -> Lesson:
        """A random question about a clip."""
        question = ask_any(clip.scene, rng)
        first = bool(rng.random() < QUESTION_FIRST)
        return lesson(clip, question, self._prompts, question_first=first)


def _glance(clip: TokenClip, rng: np.random.Generator) -> tuple[Shown, Question]:
    """A picture out of the clip, and a question about it."""
    index = int(rng.integers(len(clip.scene.sights)))
    sight = clip.scene.sights[index]
    alone = replace(clip.scene, sights=(sight,), sounds=())
    question = ask_any(alone, rng, AT_A_GLANCE)
    return still(clip, int(sight.start)), replace(question, seen=(index,) * len(question.seen))


def all_right(output: Output, lessons: LessonBatch) -> list[bool]:
    """Which answers have the right token as the likeliest one everywhere, their end included."""
    targets = lessons.batch.targets
    right = (output.logits.argmax(-1) == targets).split(lessons.batch.answer_valid.sum(1).tolist())
    return [bool(one.all()) for one in right]


def _begin(module: nn.Module) -> None:
    """Small weights to begin with: large ones hardly move, and what they compute is not learned."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.03)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.3)


@dataclass(frozen=True, slots=True)
class Course:
    """One training of the language model.

    Attributes:
        folder: For its curve and state.
        parts: Files of cached clips.
        checkpoint: Directory with tokenizer and config.json.
        steps: Of the optimizer.
        seed: Of everything.
        rate: Highest learning rate.
        variant: What is trained.
        begin: State of another course to begin with; clips of all lengths come from then on.
    """

    folder: Path
    parts: tuple[Path, ...]
    checkpoint: Path
    steps: int
    seed: int = 0
    rate: float = 2e-3
    variant: Variant = VARIANTS["shipped"]
    begin: Path | None = None

    def student(self) -> Student:
        """The model before the first step, the same for the same seed."""
        torch.manual_seed(self.seed)
        config = load_config(self.checkpoint)
        if self.variant.sections is not None:
            text_config(config).sync_rope_section = list(self.variant.sections)
        student = Student(config, self.variant)
        if self.begin is not None:
            learned = torch.load(self.begin, weights_only=True)["module"]
            # A selector that the other course does not have begins anew.
            student.load_state_dict(student.state_dict() | learned)
        return student

    def lessons(self, parts: Sequence[Path]) -> Lessons:
        """The clips of some files, as far as they are for this course."""
        longest = self.variant.longest or math.inf
        clips = (clip for clip in read_parts(parts) if clip.scene.seconds <= longest)
        return Lessons(clips, Prompts(self.checkpoint))


def follow(rank: int, course: Course) -> None:
    """Do one process's share of a course."""
    student = course.student()
    lessons = course.lessons(course.parts)
    run = Run(course.folder, student, course.steps, course.rate, muon=True, quiet=rank > 0)
    for step in run.steps():
        rng = np.random.default_rng([course.seed, step, rank])
        # Length and keep ratio are those of all processes, so that none waits for another.
        common = np.random.default_rng([course.seed, step])
        seconds = lessons.length(common, 1.0 if course.begin else step / course.steps)
        batch = lessons.batch(rng, seconds, float(common.choice(course.variant.keep_ratios)))
        with torch.autocast("cpu", torch.bfloat16):
            loss, figures = student(batch)
        run.update(loss, figures)
