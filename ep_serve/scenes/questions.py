"""Generate questions about a scene, with their answers and evidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ep_serve.scenes.answers import NOTHING, find_candidates
from ep_serve.scenes.scene import COLOURS, MOTIONS, PLACES, SHAPES, SOUNDS, Scene

MAX_COUNT = 8
"""The largest number that is an answer."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with one right answer.

    Attributes:
        kind: Which of `KINDS` it is.
        text: The question.
        answer: In lower case, without an article.
        seen: Indices of the sights that are evidence for the answer.
        heard: Indices of the sounds that are evidence for the answer.
    """

    kind: str
    text: str
    answer: str
    seen: tuple[int, ...] = ()
    heard: tuple[int, ...] = ()

    @property
    def task(self) -> str:
        """The task of its kind: seen, heard, where, count, cross or order."""
        return self.kind.split("-")[0]


WORDINGS: dict[str, tuple[str, ...]] = {
    "seen-colour": (
        "What colour was the {shape}?",
        "What color is the {shape}?",
        "Which colour did the {shape} have?",
    ),
    "seen-shape": (
        "What shape was {colour}?",
        "Which shape is {colour}?",
        "What is the shape of the {colour} thing?",
    ),
    "seen-there": (
        "Is there a {colour} {shape}?",
        "Was a {colour} {shape} shown?",
        "Do you see a {colour} {shape}?",
    ),
    "heard-there": (
        "Is there {a_sound} in the clip?",
        "Do you hear {a_sound}?",
        "Can {a_sound} be heard?",
    ),
    "heard-only": (
        "What sound is heard?",
        "What do you hear?",
        "Which sound can be heard in the clip?",
    ),
    "where-place": (
        "Where was the {sight}?",
        "Where is the {sight}?",
        "In which place was the {sight} shown?",
    ),
    "where-motion": (
        "Which way did the {sight} move?",
        "In which direction does the {sight} move?",
        "Where did the {sight} go?",
    ),
    "count-sound": (
        "How many times did the {sound} sound?",
        "How often was the {sound} heard?",
        "How many times do you hear the {sound}?",
    ),
    "count-sounds": ("How many sounds were heard?", "How many sounds are in the clip?"),
    "count-sights": ("How many shapes were shown?", "How many shapes are in the clip?"),
    "count-shape": (
        "How many times was a {shape} shown?",
        "How often do you see a {shape}?",
    ),
    "count-colour": (
        "How many times was something {colour} shown?",
        "How often do you see a {colour} shape?",
    ),
    "cross-colour": (
        "Which colour was shown when the {sound} sounded?",
        "What color was the shape when the {sound} was heard?",
        "What colour was on the screen during the {sound}?",
    ),
    "cross-shape": (
        "Which shape was shown when the {sound} sounded?",
        "What shape did you see when the {sound} was heard?",
        "What shape was on the screen during the {sound}?",
    ),
    "cross-sound": (
        "What sounded when the {sight} was shown?",
        "Which sound was heard when the {sight} was there?",
        "What do you hear while the {sight} is on the screen?",
    ),
    "order-sights": (
        "Which came first, the {sight} or the {other}?",
        "What was shown first, the {sight} or the {other}?",
    ),
    "order-sounds": (
        "Which came first, the {sound} or the {other}?",
        "What sounded first, the {sound} or the {other}?",
    ),
    "order-sound": ("What was the {end} sound?", "Which sound was heard {end}?"),
    "order-shape": ("What was the {end} shape?", "Which shape was shown {end}?"),
    "order-colour": ("What was the {end} colour?", "Which colour was shown {end}?"),
    "order-mixed": (
        "Did the {sound} sound {when} the {sight} was shown?",
        "Was the {sound} heard {when} the {sight} was there?",
    ),
}
KINDS = tuple(WORDINGS)
VIDEO_KINDS = (
    *("seen-colour", "seen-shape", "seen-there", "where-place", "where-motion"),
    *("count-sights", "count-shape", "count-colour"),
    *("order-sights", "order-shape", "order-colour"),
)
"""Kinds that the video alone answers."""
AUDIO_KINDS = (
    *("heard-there", "heard-only", "count-sound", "count-sounds", "order-sounds", "order-sound"),
)
"""Kinds that the audio alone answers."""
SINGLE_FRAME_KINDS = ("seen-colour", "seen-shape", "seen-there", "where-place")
"""Kinds that a single frame can answer."""
WEIGHTS: dict[str, float] = {
    **dict.fromkeys(KINDS, 1.0),
    "cross-sound": 3.0,
    "cross-colour": 1.5,
    "cross-shape": 1.5,
    # These are learned last: co-occurrence and counting.
    **dict.fromkeys(["seen-there", "order-mixed", "order-sights"], 2.0),
    **dict.fromkeys(["count-sound", "count-sounds"], 3.0),
    **dict.fromkeys(["count-sights", "count-shape", "count-colour"], 3.0),
}
"""Sampling weights of the kinds in training."""
ACCEPTANCE_RATES: dict[tuple[str, str], float] = {
    **dict.fromkeys([("count-sound", "1"), ("count-shape", "1"), ("count-colour", "1")], 0.35),
    **dict.fromkeys([("count-sounds", "3"), ("count-sights", "3")], 0.3),
}
"""{(kind, answer): share of these questions that is kept}, for answers that are too frequent."""

ANSWERS = tuple(
    dict.fromkeys(
        [
            *COLOURS,
            *SHAPES,
            *SOUNDS,
            *PLACES,
            *MOTIONS,
            *("yes", "no", NOTHING),
            *map(str, range(1, MAX_COUNT + 1)),
        ]
    )
)
"""Every word that is part of an answer."""


def vocabulary() -> tuple[str, ...]:
    """Every word of every question and answer, as it is written: after a space, or first."""
    texts = [wording for wordings in WORDINGS.values() for wording in wordings]
    after_space = {word.strip("?,.") for text in texts for word in text.split()[1:]}
    first = {text.split()[0] for text in texts} | set(ANSWERS)
    after_space |= {*ANSWERS, *("a", "first", "last", "before", "after")}
    return (
        *sorted(f" {word}" for word in after_space if word and "{" not in word),
        *sorted(first),
    )


def make_question(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """Generate a question of one kind, or None if the scene has no unique answer to any.

    Where a scene has several answers, each is as likely as the others.
    """
    candidates = find_candidates(scene, kind)
    if not candidates:
        return None
    answers = sorted({candidate.answer for candidate in candidates})
    answer = answers[rng.integers(len(answers))]
    matching = [candidate for candidate in candidates if candidate.answer == answer]
    candidate = matching[rng.integers(len(matching))]
    wordings = WORDINGS[kind]
    return Question(
        kind=kind,
        text=wordings[rng.integers(len(wordings))].format(**candidate.words),
        answer=answer,
        seen=tuple(candidate.seen),
        heard=tuple(candidate.heard),
    )


def make_random_question(
    scene: Scene, rng: np.random.Generator, kinds: Sequence[str] = KINDS
) -> Question:
    """Generate a question of a random kind; at least one of `kinds` must fit the scene."""
    weights = np.array([WEIGHTS[kind] for kind in kinds])
    for number in rng.choice(len(kinds), len(kinds), replace=False, p=weights / weights.sum()):
        question = make_question(scene, kinds[number], rng)
        if question is None:
            continue
        if rng.random() < ACCEPTANCE_RATES.get((question.kind, question.answer), 1.0):
            return question
    return make_random_question(scene, rng, kinds)
