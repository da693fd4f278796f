"""Questions about a scene, their answers, and what one has to have seen or heard to know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ep_serve.scenes.answers import NOTHING, find_options
from ep_serve.scenes.scene import COLOURS, MOTIONS, PLACES, SHAPES, SOUNDS, Scene

MOST = 8
"""The largest number that is an answer."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with one right answer.

    Attributes:
        kind: Which of `KINDS` it is.
        text: The question.
        answer: In lower case, without an article.
        seen: Indices of the scene's sights that the answer rests on.
        heard: The same for its sounds.
    """

    kind: str
    text: str
    answer: str
    seen: tuple[int, ...] = ()
    heard: tuple[int, ...] = ()

    @property
    def task(self) -> str:
        """What kind of knowledge it takes: seen, heard, where, count, cross or order."""
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
BY_EYE = (
    *("seen-colour", "seen-shape", "seen-there", "where-place", "where-motion"),
    *("count-sights", "count-shape", "count-colour"),
    *("order-sights", "order-shape", "order-colour"),
)
"""Kinds that need no sound."""
BY_EAR = (
    *("heard-there", "heard-only", "count-sound", "count-sounds", "order-sounds", "order-sound"),
)
"""Kinds that need no picture."""
AT_A_GLANCE = ("seen-colour", "seen-shape", "seen-there", "where-place")
"""Kinds that a single picture can answer."""
WEIGHTS: dict[str, float] = {
    **dict.fromkeys(KINDS, 1.0),
    "cross-sound": 3.0,
    "cross-colour": 1.5,
    "cross-shape": 1.5,
    # The last to be learned: two things at once, or several things one by one.
    **dict.fromkeys(["seen-there", "order-mixed", "order-sights"], 2.0),
    **dict.fromkeys(["count-sound", "count-sounds"], 3.0),
    **dict.fromkeys(["count-sights", "count-shape", "count-colour"], 3.0),
}
"""How often each kind is asked in training."""
COMMON: dict[tuple[str, str], float] = {
    **dict.fromkeys([("count-sound", "1"), ("count-shape", "1"), ("count-colour", "1")], 0.35),
    **dict.fromkeys([("count-sounds", "3"), ("count-sights", "3")], 0.3),
}
"""Share of the questions with an answer that comes too often which are asked all the same."""

ANSWERS = tuple(
    dict.fromkeys(
        [
            *COLOURS,
            *SHAPES,
            *SOUNDS,
            *PLACES,
            *MOTIONS,
            *("yes", "no", NOTHING),
            *map(str, range(1, MOST + 1)),
        ]
    )
)
"""Every word that is part of an answer."""


def words() -> tuple[str, ...]:
    """Every word of every question and answer, as it is written: after a space, or first."""
    texts = [wording for wordings in WORDINGS.values() for wording in wordings]
    after_space = {word.strip("?,.") for text in texts for word in text.split()[1:]}
    first = {text.split()[0] for text in texts} | set(ANSWERS)
    after_space |= {*ANSWERS, *("a", "first", "last", "before", "after")}
    return (
        *sorted(f" {word}" for word in after_space if word and "{" not in word),
        *sorted(first),
    )


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """Ask a question of one kind, or None if the scene has no clear answer to any.

    Where a scene has several answers, each is as likely as the others.
    """
    options = find_options(scene, kind)
    if not options:
        return None
    answers = sorted({option.answer for option in options})
    answer = answers[rng.integers(len(answers))]
    fitting = [option for option in options if option.answer == answer]
    option = fitting[rng.integers(len(fitting))]
    wordings = WORDINGS[kind]
    return Question(
        kind=kind,
        text=wordings[rng.integers(len(wordings))].format(**option.words),
        answer=answer,
        seen=tuple(option.seen),
        heard=tuple(option.heard),
    )


def ask_any(scene: Scene, rng: np.random.Generator, kinds: Sequence[str] = KINDS) -> Question:
    """Ask a question of one of some kinds, of which one at least must fit the scene."""
    weights = np.array([WEIGHTS[kind] for kind in kinds])
    for number in rng.choice(len(kinds), len(kinds), replace=False, p=weights / weights.sum()):
        question = ask(scene, kinds[number], rng)
        if question is None:
            continue
        if rng.random() < COMMON.get((question.kind, question.answer), 1.0):
            return question
    return ask_any(scene, rng, kinds)
