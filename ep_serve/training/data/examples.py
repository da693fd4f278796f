"""Clips and questions as examples, with what the extra losses need to know about each AV token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer

from ep_serve.checkpoint.embedded import CONFIG
from ep_serve.layout import (
    Audio,
    Image,
    Kind,
    MediaTokens,
    Medium,
    Video,
    build_layout,
)
from ep_serve.scenes.questions import Question
from ep_serve.scenes.scene import Scene
from ep_serve.training.data.labels import ASPECTS, CONTENT, TOKENS_PER_SECOND, tell_seconds
from ep_serve.training.data.token_clip import TokenClip
from ep_serve.training.model.batch import Batch, Example, collate

MEDIA_TOKENS = MediaTokens.from_config(CONFIG["thinker_config"])
NOT_TOLD = -100
"""Target of a token about which nothing is asked."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """An example, and the truth about each of its AV tokens.

    Attributes:
        example: What the model sees.
        scene: What happens in the clip.
        question: What is asked about it.
        aspects: {aspect: (N_av,) int64}, what is going on in the token's own second.
        evidence: (groups, N_av) bool, for everything that the answer rests on its tokens.
    """

    example: Example
    scene: Scene
    question: Question
    aspects: dict[str, NDArray[np.int64]]
    evidence: NDArray[np.bool_]


class Prompts:
    """Writes questions the way the chat template of a checkpoint does."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        self._end: int = self._tokenizer.eos_token_id
        self._frames: dict[tuple[str, bool], tuple[str, str]] = {}

    def prompt(
        self, question: str, medium: str = "video", *, question_first: bool = False
    ) -> list[int]:
        """Token ids with one placeholder for the medium: video, audio or image."""
        frame = (medium, question_first)
        if frame not in self._frames:
            self._frames[frame] = self._frame(*frame)
        before, after = self._frames[frame]
        ids: list[int] = self._tokenizer(before + question + after).input_ids
        return ids

    def answer(self, answer: str) -> list[int]:
        """Token ids with the one that ends an answer."""
        return [*self._tokenizer(answer).input_ids, self._end]

    def read(self, ids: Sequence[int]) -> str:
        """The text of an answer."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _frame(self, medium: str, question_first: bool) -> tuple[str, str]:
        mark = "\x00"
        content = [{"type": medium}, {"type": "text", "text": mark}]
        text = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content[::-1] if question_first else content}],
            tokenize=False,
            add_generation_prompt=True,
        )
        before, after = text.split(mark)
        return before, after


@dataclass(frozen=True, slots=True)
class Shown:
    """What of a clip stands in a prompt, its tokens in prompt order within each kind.

    Attributes:
        medium: For the layout.
        kind: Of the placeholder: video, audio or image.
        video: Indices of the clip's video tokens.
        audio: Indices of its audio tokens.
    """

    medium: Medium
    kind: str
    video: NDArray[np.int64]
    audio: NDArray[np.int64]


def whole(clip: TokenClip) -> Shown:
    """The clip with its sound."""
    medium = Video(clip.grid, clip.second_per_grid, len(clip.audio))
    return Shown(medium, "video", np.arange(len(clip.video)), np.arange(len(clip.audio)))


def silent(clip: TokenClip) -> Shown:
    """The clip without its sound."""
    medium = Video(clip.grid, clip.second_per_grid)
    return Shown(medium, "video", np.arange(len(clip.video)), np.arange(0))


def sound_alone(clip: TokenClip) -> Shown:
    """The clip's sound without its picture."""
    audio = np.arange(len(clip.audio))
    return Shown(Audio(len(audio)), "audio", np.arange(0), audio)


def still(clip: TokenClip, second: int) -> Shown:
    """One pair of frames of the clip as a picture."""
    _, height, width = clip.grid
    per_pair = len(clip.video) // clip.grid[0]
    video = np.arange(second * per_pair, (second + 1) * per_pair)
    return Shown(Image((1, height, width)), "image", video, np.arange(0))


def lesson(
    clip: TokenClip,
    question: Question,
    prompts: Prompts,
    shown: Shown | None = None,
    *,
    question_first: bool = False,
) -> Lesson:
    """Lay out one question about one clip, or about what is `shown` of it."""
    shown = shown or whole(clip)
    prompt = prompts.prompt(question.text, shown.kind, question_first=question_first)
    layout = build_layout(prompt, [shown.medium], MEDIA_TOKENS)
    is_audio = layout.kinds[layout.is_av] == Kind.AUDIO
    # Where in the clip's tokens, its picture before its sound, each AV token comes from.
    source = np.empty(layout.num_av, dtype=np.int64)
    source[~is_audio] = shown.video
    source[is_audio] = len(clip.video) + shown.audio
    return Lesson(
        example=Example(
            layout,
            torch.cat([clip.video, clip.audio])[torch.from_numpy(source)],
            prompts.answer(question.answer),
        ),
        scene=clip.scene,
        question=question,
        aspects={name: truth[source] for name, truth in _aspects(clip, shown).items()},
        evidence=_evidence(clip, question)[:, source],
    )


def _aspects(clip: TokenClip, shown: Shown) -> dict[str, NDArray[np.int64]]:
    """What goes on in the second of each of the clip's tokens, its picture before its sound.

    Nothing is asked about what is not in the prompt.
    """
    per_pair = len(clip.video) // clip.grid[0]
    seconds = np.concatenate(
        [
            np.arange(len(clip.video)) // per_pair,
            np.arange(len(clip.audio)) // TOKENS_PER_SECOND,
        ]
    )
    last = clip.scene.seconds - 1  # a track of sound may be a little longer
    aspects = {}
    for aspect, truth in tell_seconds(clip.scene).items():
        told = len(shown.audio) if "sound" in aspect else len(shown.video)
        if shown.kind == "image" and aspect not in CONTENT:
            told = 0  # a picture does not tell what came before it
        aspects[aspect] = np.where(
            (seconds <= last) & bool(told), truth[seconds.clip(max=last)], NOT_TOLD
        )
    return aspects


def _evidence(clip: TokenClip, question: Question) -> NDArray[np.bool_]:
    """(groups, tokens) bool over the clip's tokens, its picture before its sound."""
    covers = clip.labels.covers.reshape(len(clip.labels.covers), -1)
    second = np.arange(len(covers))[:, None]
    time = (np.arange(len(clip.audio)) + 0.5) / TOKENS_PER_SECOND
    groups = np.zeros(
        (len(question.seen) + len(question.heard), len(clip.video) + len(clip.audio)), dtype=bool
    )
    for group, index in zip(groups, question.seen, strict=False):
        sight = clip.scene.sights[index]
        during = (second + 1 > sight.start) & (second < sight.end)
        group[: len(clip.video)] = (covers & during).ravel()
    for group, index in zip(groups[len(question.seen) :], question.heard, strict=True):
        sound = clip.scene.sounds[index]
        group[len(clip.video) :] = (sound.start <= time) & (time < sound.end)
    return groups


@dataclass(frozen=True, slots=True)
class LessonBatch:
    """Lessons side by side.

    Attributes:
        batch: For the model.
        aspects: {aspect: (n,) int64} for the AV tokens of all prompts behind each other.
        evidence: (groups, L) bool, over the padded prompt.
        rows: (groups,) int64, the prompt to which a group belongs.
        kinds: The kind of each question.
    """

    batch: Batch
    aspects: dict[str, Tensor]
    evidence: Tensor
    rows: Tensor
    kinds: list[str]


def collate_lessons(lessons: Sequence[Lesson], keep_ratios: Sequence[float]) -> LessonBatch:
    """Put lessons side by side; each has its own keep ratio."""
    batch = collate([lesson.example for lesson in lessons], keep_ratios)
    groups = [
        (row, np.flatnonzero(one.example.layout.is_av)[group])
        for row, one in enumerate(lessons)
        for group in one.evidence
        if group.any()
    ]
    evidence = torch.zeros(len(groups), batch.valid.shape[1], dtype=torch.bool)
    for number, (_, places) in enumerate(groups):
        evidence[number, places] = True
    return LessonBatch(
        batch=batch,
        aspects={
            aspect: torch.from_numpy(np.concatenate([le.aspects[aspect] for le in lessons]))
            for aspect in ASPECTS
        },
        evidence=evidence,
        rows=torch.tensor([row for row, _ in groups], dtype=torch.int64),
        kinds=[lesson.question.kind for lesson in lessons],
    )
