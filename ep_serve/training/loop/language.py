"""Train refiner, score head and decoder on cached tokens (stage three).

Three losses: cross entropy of the answer; classification of what happens in each AV token's second,
from the output of the refiner (without it training takes far longer); and the mass that the softmax
of the scores puts on the evidence.
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
from ep_serve.scenes.questions import (
    AUDIO_KINDS,
    SINGLE_FRAME_KINDS,
    VIDEO_KINDS,
    Question,
    make_random_question,
)
from ep_serve.training.data.examples import (
    IGNORE_INDEX,
    ClipView,
    LabelledBatch,
    LabelledExample,
    PromptEncoder,
    audio_view,
    build_example,
    collate_labelled,
    frame_view,
    video_view,
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
DENSE_WEIGHT = 1.0
"""Weight of the dense loss."""
EVIDENCE_WEIGHT = 1.0
"""Weight of `evidence_loss`."""
BATCH_TOKENS = 5200
"""Approximate AV tokens in a batch of one process; long clips make small batches."""
MAX_QUESTIONS = 16
"""Questions in a batch of one process."""
LENGTH_CURRICULUM = ((0.15, 5), (0.3, 8), (0.45, 12))
"""Curriculum: (share of the steps, longest clips in seconds until then)."""
PART_SHARE = 0.04
"""Share of the prompts with a silent clip; as many with a sound alone, and with a picture."""
QUESTION_FIRST_SHARE = 0.15
"""Share of the prompts in which the question stands before the clip."""


@dataclass(frozen=True, slots=True)
class Variant:
    """An ablation: how a training differs from that of the shipped model.

    Attributes:
        keep_ratios: One of them is drawn for each step; 1 alone trains with all tokens.
        close_bypass: The decoder gets text unrefined.
        sieve: Sieve that selects instead of CS2: "uniform" or "random" among the refined tokens,
            "omnisift" without a refiner and with its own selector.
        sections: Channels of the rows T, H, W and T again, instead of Sync-RoPE's.
        longest: Seconds of the longest clips; None takes all.
        step_factor: Multiplies the number of steps.
        from_scratch: Start from random weights instead of those of the shipped model.
    """

    keep_ratios: tuple[float, ...] = KEEP_RATIOS
    close_bypass: bool = False
    sieve: str | None = None
    sections: tuple[int, int, int, int] | None = None
    longest: int | None = None
    step_factor: int = 1
    from_scratch: bool = False

    @property
    def has_refiner(self) -> bool:
        """Whether the model has the refiner."""
        return self.sieve != "omnisift"

    @property
    def is_servable(self) -> bool:
        """Whether the engine can serve its checkpoint."""
        return self.sieve is None and not self.close_bypass


SHORT_CLIPS = 8
"""Longest clips, in seconds, of variants with another sieve or a closed bypass."""
M_ROPE = (8, 12, 12, 0)
"""Qwen2.5-Omni's sections 16, 24, 24 for heads of 128, scaled to heads of 64."""
VARIANTS = {
    "shipped": Variant(),
    # Variants not from scratch start from the shipped model; "again" is their baseline.
    "again": Variant(),
    # Neither may start from weights that were trained with the other's positions.
    "anew": Variant(step_factor=5, from_scratch=True),
    "mrope": Variant(sections=M_ROPE, step_factor=5, from_scratch=True),
    "full": Variant(keep_ratios=(1.0,)),
    "uniform": Variant(sieve="uniform", longest=SHORT_CLIPS),
    "random": Variant(sieve="random", longest=SHORT_CLIPS),
    "closed": Variant(close_bypass=True, longest=SHORT_CLIPS),
    "closed-uniform": Variant(close_bypass=True, sieve="uniform", longest=SHORT_CLIPS),
    "closed-random": Variant(close_bypass=True, sieve="random", longest=SHORT_CLIPS),
    # The shipped decoder was not trained on unrefined tokens.
    "omnisift": Variant(sieve="omnisift", longest=SHORT_CLIPS, step_factor=6, from_scratch=True),
}


class TrainingModel(nn.Module):
    """The model, with linear classifiers of the refiner's output."""

    def __init__(self, config: Any, variant: Variant) -> None:
        super().__init__()
        self.has_refiner = variant.has_refiner
        self.thinker = Thinker(config, close_bypass=variant.close_bypass, sieve=variant.sieve)
        width = self.thinker.lm_head.in_features
        self.heads = nn.ModuleDict({a: nn.Linear(width, n) for a, n in ASPECTS.items()})
        self.apply(_init_weights)

    def forward(self, labelled: LabelledBatch) -> tuple[Tensor, dict[str, float]]:
        """The loss, its parts, and the share of exactly matching answers.

        Without a refiner the decoder's states are classified, and there is no `evidence_loss`.
        """
        output = self.thinker(labelled.batch)
        answer_loss = F.cross_entropy(output.logits.float(), labelled.batch.targets)
        dense, accuracies = self._dense(output, labelled)
        loss = answer_loss + DENSE_WEIGHT * dense
        right = exact_matches(output, labelled)
        figures = {
            "words": answer_loss.item(),
            "right": sum(right) / len(right),
            "dense": dense.item(),
        }
        if self.has_refiner:
            evidence = evidence_loss(output.scores, labelled)
            loss = loss + EVIDENCE_WEIGHT * evidence
            figures["pointing"] = evidence.item()
        figures |= {"loss": loss.item(), **accuracies}
        by_task = defaultdict(list)
        for kind, one in zip(labelled.kinds, right, strict=True):
            by_task[kind].append(float(one))
        return loss, figures | {f"right/{k}": sum(v) / len(v) for k, v in by_task.items()}

    def _dense(self, output: Output, labelled: LabelledBatch) -> tuple[Tensor, dict[str, float]]:
        is_av = labelled.batch.is_av
        left = torch.ones_like(is_av) if self.has_refiner else output.kept
        states = (output.refined if self.has_refiner else output.decoded)[is_av & left]
        total = states.new_zeros(())
        accuracies = {}
        for aspect, every in labelled.aspects.items():
            truth = every[left[is_av]]
            logits = self.heads[aspect](states)
            total = total + F.cross_entropy(logits.float(), truth, ignore_index=IGNORE_INDEX)
            there = truth > 0
            accuracies[f"told/{aspect}"] = (
                (logits.argmax(-1)[there] == truth[there]).float().mean().item()
            )
        return total / len(CONTENT), accuracies


def evidence_loss(scores: Tensor, labelled: LabelledBatch) -> Tensor:
    """The mean of -log(mass of the scores' softmax) over everything that answers rest on."""
    if not len(labelled.rows):
        return scores.new_zeros(())
    own = scores[labelled.rows]
    inside = own.masked_fill(~labelled.evidence, float("-inf"))
    return (own.logsumexp(1) - inside.logsumexp(1)).mean()


class QuestionSampler:
    """Samples batches of questions about clips of one length, which need little padding."""

    def __init__(self, clips: Iterable[TokenClip], prompts: PromptEncoder) -> None:
        self._prompts = prompts
        self._clips: dict[int, list[TokenClip]] = defaultdict(list)
        for clip in clips:
            self._clips[clip.scene.seconds].append(clip)

    def clips(self) -> Iterator[TokenClip]:
        """All clips, the short ones first."""
        for seconds in sorted(self._clips):
            yield from self._clips[seconds]

    def length(self, rng: np.random.Generator, along: float) -> int:
        """Draw the clip length of a batch: short clips first, all of them later.

        Batches of long clips hold fewer of them, so they are drawn more often.
        """
        longest = next(
            (most for until, most in LENGTH_CURRICULUM if along < until), max(self._clips)
        )
        lengths = sorted(n for n in self._clips if n <= longest) or [min(self._clips)]
        seconds = np.array([n * len(self._clips[n]) for n in lengths], dtype=float)
        return int(rng.choice(lengths, p=seconds / seconds.sum()))

    def batch(self, rng: np.random.Generator, seconds: int, keep_ratio: float) -> LabelledBatch:
        """Random questions about clips of `seconds`, at one keep ratio.

        With several ratios in a batch, all prompts would be padded to those that are not reduced.
        """
        clips = self._clips[seconds]
        size = max(2, min(MAX_QUESTIONS, BATCH_TOKENS // (34 * seconds)))
        examples = [self.sample_varied(clips[rng.integers(len(clips))], rng) for _ in range(size)]
        return collate_labelled(examples, [keep_ratio] * size)

    def sample_varied(self, clip: TokenClip, rng: np.random.Generator) -> LabelledExample:
        """A random question about a clip, sometimes shown only in part."""
        part = rng.random()
        if part < 3 * PART_SHARE:
            if part < PART_SHARE:
                view, question = (
                    video_view(clip),
                    make_random_question(clip.scene, rng, VIDEO_KINDS),
                )
            elif part < 2 * PART_SHARE:
                view, question = (
                    audio_view(clip),
                    make_random_question(clip.scene, rng, AUDIO_KINDS),
                )
            else:
                view, question = _single_frame_question(clip, rng)
            return build_example(clip, question, self._prompts, view)
        return self.build_example(clip, rng)

    def build_example(self, clip: TokenClip, rng: np.random.Generator) -> LabelledExample:
        """A random question about a clip."""
        question = make_random_question(clip.scene, rng)
        first = bool(rng.random() < QUESTION_FIRST_SHARE)
        return build_example(clip, question, self._prompts, question_first=first)


def _single_frame_question(clip: TokenClip, rng: np.random.Generator) -> tuple[ClipView, Question]:
    """A still frame of the clip, and a question about it."""
    index = int(rng.integers(len(clip.scene.sights)))
    sight = clip.scene.sights[index]
    alone = replace(clip.scene, sights=(sight,), sounds=())
    question = make_random_question(alone, rng, SINGLE_FRAME_KINDS)
    return frame_view(clip, int(sight.start)), replace(question, seen=(index,) * len(question.seen))


def exact_matches(output: Output, labelled: LabelledBatch) -> list[bool]:
    """Whether all tokens of each answer, its end included, are the most likely ones."""
    targets = labelled.batch.targets
    right = (output.logits.argmax(-1) == targets).split(labelled.batch.answer_valid.sum(1).tolist())
    return [bool(one.all()) for one in right]


def _init_weights(module: nn.Module) -> None:
    """Initialize small weights: large ones hardly change in training."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.03)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.3)


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """One training of the language model.

    Attributes:
        folder: For its curve and state.
        parts: Files of cached clips.
        checkpoint: Directory with tokenizer and config.json.
        steps: Of the optimizer.
        seed: Of everything.
        rate: Highest learning rate.
        variant: What is trained.
        init_from: State of another training to start from; then clips of all lengths are used.
    """

    folder: Path
    parts: tuple[Path, ...]
    checkpoint: Path
    steps: int
    seed: int = 0
    rate: float = 2e-3
    variant: Variant = VARIANTS["shipped"]
    init_from: Path | None = None

    def build_model(self) -> TrainingModel:
        """Build the model as before the first step, deterministic in the seed."""
        torch.manual_seed(self.seed)
        config = load_config(self.checkpoint)
        if self.variant.sections is not None:
            text_config(config).sync_rope_section = list(self.variant.sections)
        model = TrainingModel(config, self.variant)
        if self.init_from is not None:
            learned = torch.load(self.init_from, weights_only=True)["module"]
            # A selector that the other training does not have starts from random weights.
            model.load_state_dict(model.state_dict() | learned)
        return model

    def load_sampler(self, parts: Sequence[Path]) -> QuestionSampler:
        """A sampler over the clips of these files that are not too long for the variant."""
        longest = self.variant.longest or math.inf
        clips = (clip for clip in read_parts(parts) if clip.scene.seconds <= longest)
        return QuestionSampler(clips, PromptEncoder(self.checkpoint))


def train_rank(rank: int, job: TrainingJob) -> None:
    """Run the training loop of one data-parallel process."""
    model = job.build_model()
    sampler = job.load_sampler(job.parts)
    run = Run(job.folder, model, job.steps, job.rate, muon=True, quiet=rank > 0)
    for step in run.steps():
        rng = np.random.default_rng([job.seed, step, rank])
        # Length and keep ratio are those of all processes, so that they finish a step together.
        common = np.random.default_rng([job.seed, step])
        seconds = sampler.length(common, 1.0 if job.init_from else step / job.steps)
        batch = sampler.batch(rng, seconds, float(common.choice(job.variant.keep_ratios)))
        with torch.autocast("cpu", torch.bfloat16):
            loss, figures = model(batch)
        run.update(loss, figures)
