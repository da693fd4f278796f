"""Build training examples from clips and questions, with labels of each AV token."""

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
    MediumShape,
    Video,
    build_layout,
)
from ep_serve.scenes.questions import Question
from ep_serve.scenes.scene import Scene
from ep_serve.training.data.labels import ASPECTS, CONTENT, TOKENS_PER_SECOND, label_seconds
from ep_serve.training.data.token_clip import TokenClip
from ep_serve.training.model.batch import Batch, Example, collate

MEDIA_TOKENS = MediaTokens.from_config(CONFIG["thinker_config"])
IGNORE_INDEX = -100
"""Target of a token that does not count in the loss."""


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """An example with labels of each of its AV tokens.

    Attributes:
        example: Input of the model.
        scene: The scene of the clip.
        question: The question about it.
        aspects: {aspect: (N_av,) int64}, class in the token's second.
        evidence: (groups, N_av) bool, the tokens of each event that is evidence for the answer.
    """

    example: Example
    scene: Scene
    question: Question
    aspects: dict[str, NDArray[np.int64]]
    evidence: NDArray[np.bool_]


class PromptEncoder:
    """Tokenizes questions and answers with the chat template of a checkpoint."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
        self._end: int = self._tokenizer.eos_token_id
        self._frames: dict[tuple[str, bool], tuple[str, str]] = {}

    def encode_prompt(
        self, question: str, medium: str = "video", *, question_first: bool = False
    ) -> list[int]:
        """Token ids of a question with one placeholder of the medium: video, audio or image."""
        frame = (medium, question_first)
        if frame not in self._frames:
            self._frames[frame] = self._frame(*frame)
        before, after = self._frames[frame]
        ids: list[int] = self._tokenizer(before + question + after).input_ids
        return ids

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of an answer, with the end token."""
        return [*self._tokenizer(answer).input_ids, self._end]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode an answer to text."""
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
class ClipView:
    """The part of a clip that is in a prompt, its tokens in prompt order within each kind.

    Attributes:
        medium: MediumShape of the prompt layout.
        kind: Placeholder: video, audio or image.
        video: Indices of the clip's video tokens.
        audio: Indices of its audio tokens.
    """

    medium: MediumShape
    kind: str
    video: NDArray[np.int64]
    audio: NDArray[np.int64]


def full_view(clip: TokenClip) -> ClipView:
    """The clip with its audio."""
    medium = Video(clip.grid, clip.second_per_grid, len(clip.audio))
    return ClipView(medium, "video", np.arange(len(clip.video)), np.arange(len(clip.audio)))


def video_view(clip: TokenClip) -> ClipView:
    """The clip without its audio."""
    medium = Video(clip.grid, clip.second_per_grid)
    return ClipView(medium, "video", np.arange(len(clip.video)), np.arange(0))


def audio_view(clip: TokenClip) -> ClipView:
    """The audio of the clip without its video."""
    audio = np.arange(len(clip.audio))
    return ClipView(Audio(len(audio)), "audio", np.arange(0), audio)


def frame_view(clip: TokenClip, second: int) -> ClipView:
    """One pair of frames of the clip as an image."""
    _, height, width = clip.grid
    per_pair = len(clip.video) // clip.grid[0]
    video = np.arange(second * per_pair, (second + 1) * per_pair)
    return ClipView(Image((1, height, width)), "image", video, np.arange(0))


def build_example(
    clip: TokenClip,
    question: Question,
    prompts: PromptEncoder,
    view: ClipView | None = None,
    *,
    question_first: bool = False,
) -> LabelledExample:
    """Build the example of a question about a clip, or about a view of it."""
    view = view or full_view(clip)
    prompt = prompts.encode_prompt(question.text, view.kind, question_first=question_first)
    layout = build_layout(prompt, [view.medium], MEDIA_TOKENS)
    is_audio = layout.kinds[layout.is_av] == Kind.AUDIO
    # Index of each AV token in the clip's tokens, video before audio.
    source = np.empty(layout.num_av, dtype=np.int64)
    source[~is_audio] = view.video
    source[is_audio] = len(clip.video) + view.audio
    return LabelledExample(
        example=Example(
            layout,
            torch.cat([clip.video, clip.audio])[torch.from_numpy(source)],
            prompts.encode_answer(question.answer),
        ),
        scene=clip.scene,
        question=question,
        aspects={name: truth[source] for name, truth in _aspects(clip, view).items()},
        evidence=_evidence(clip, question)[:, source],
    )


def _aspects(clip: TokenClip, view: ClipView) -> dict[str, NDArray[np.int64]]:
    """Class of each aspect in the second of each of the clip's tokens, video before audio.

    Tokens outside of the prompt, and modalities that it lacks, have no target.
    """
    per_pair = len(clip.video) // clip.grid[0]
    seconds = np.concatenate(
        [
            np.arange(len(clip.video)) // per_pair,
            np.arange(len(clip.audio)) // TOKENS_PER_SECOND,
        ]
    )
    last = clip.scene.seconds - 1  # an audio track may be slightly longer
    aspects = {}
    for aspect, truth in label_seconds(clip.scene).items():
        visible = len(view.audio) if "sound" in aspect else len(view.video)
        if view.kind == "image" and aspect not in CONTENT:
            visible = 0  # an image does not show what came before it
        aspects[aspect] = np.where(
            (seconds <= last) & bool(visible), truth[seconds.clip(max=last)], IGNORE_INDEX
        )
    return aspects


def _evidence(clip: TokenClip, question: Question) -> NDArray[np.bool_]:
    """(groups, tokens) bool over the clip's tokens, video before audio."""
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
class LabelledBatch:
    """A padded batch of labelled examples.

    Attributes:
        batch: Input of the model.
        aspects: {aspect: (n,) int64} for the concatenated AV tokens of all prompts.
        evidence: (groups, L) bool, over the padded prompt.
        rows: (groups,) int64, the prompt of each group.
        kinds: The kind of each question.
    """

    batch: Batch
    aspects: dict[str, Tensor]
    evidence: Tensor
    rows: Tensor
    kinds: list[str]


def collate_labelled(
    examples: Sequence[LabelledExample], keep_ratios: Sequence[float]
) -> LabelledBatch:
    """Collate examples, each with its own keep ratio."""
    batch = collate([one.example for one in examples], keep_ratios)
    groups = [
        (row, np.flatnonzero(one.example.layout.is_av)[group])
        for row, one in enumerate(examples)
        for group in one.evidence
        if group.any()
    ]
    evidence = torch.zeros(len(groups), batch.valid.shape[1], dtype=torch.bool)
    for number, (_, places) in enumerate(groups):
        evidence[number, places] = True
    return LabelledBatch(
        batch=batch,
        aspects={
            aspect: torch.from_numpy(np.concatenate([one.aspects[aspect] for one in examples]))
            for aspect in ASPECTS
        },
        evidence=evidence,
        rows=torch.tensor([row for row, _ in groups], dtype=torch.int64),
        kinds=[one.question.kind for one in examples],
    )
