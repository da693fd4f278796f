"""Questions about a scene, their answers, and what one has to have seen or heard to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from ep_serve.training.scenes import COLOURS, MOTIONS, PLACES, SHAPES, SOUNDS, Scene, Sight, Sound

NOTHING = "nothing"
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
    "cross-sound": 4.0,  # the hardest: it is learned last
    "cross-colour": 2.0,
    "cross-shape": 2.0,
    "count-sound": 1.5,
    "order-mixed": 1.5,
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
    options = [o for o in _ASKERS[kind](scene) if o.answer]
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


@dataclass(frozen=True, slots=True)
class _Option:
    """A question that could be asked: the words to fill in, its answer, and its evidence."""

    words: dict[str, str]
    answer: str
    seen: Sequence[int] = ()
    heard: Sequence[int] = ()


_Asker = Callable[[Scene], list[_Option]]


def _descriptions(scene: Scene) -> dict[str, list[int]]:
    """Ways to speak of sights: by both colour and shape, or by one of them; who is meant."""
    meant: dict[str, list[int]] = {}
    for index, sight in enumerate(scene.sights):
        for words in (sight.name, sight.shape, f"{sight.colour} shape"):
            meant.setdefault(words, []).append(index)
    return meant


def _named(scene: Scene) -> dict[str, list[int]]:
    """The sounds of each name."""
    meant: dict[str, list[int]] = {}
    for index, sound in enumerate(scene.sounds):
        meant.setdefault(sound.name, []).append(index)
    return meant


def _together(one: Sight | Sound, other: Sight | Sound) -> bool:
    return one.start < other.end and other.start < one.end


def _only(values: Sequence[str]) -> str:
    """The value that all have, or nothing to say."""
    return values[0] if len(set(values)) == 1 else ""


def _seen_colour(scene: Scene) -> list[_Option]:
    options = []
    for shape in SHAPES:
        who = [i for i, sight in enumerate(scene.sights) if sight.shape == shape]
        answer = _only([scene.sights[i].colour for i in who])
        options.append(_Option({"shape": shape}, answer, who))
    return options


def _seen_shape(scene: Scene) -> list[_Option]:
    options = []
    for colour in COLOURS:
        who = [i for i, sight in enumerate(scene.sights) if sight.colour == colour]
        answer = _only([scene.sights[i].shape for i in who])
        options.append(_Option({"colour": colour}, answer, who))
    return options


def _seen_there(scene: Scene) -> list[_Option]:
    shown = _descriptions(scene)
    colours = {sight.colour for sight in scene.sights}
    shapes = {sight.shape for sight in scene.sights}
    options = []
    for colour, shape in product(COLOURS, SHAPES):
        who = shown.get(f"{colour} {shape}", [])
        # A question about something of which no part was shown would be too easy.
        if who or colour in colours or shape in shapes:
            words = {"colour": colour, "shape": shape}
            options.append(_Option(words, "yes" if who else "no", who))
    return options


def _heard_there(scene: Scene) -> list[_Option]:
    heard = _named(scene)
    return [
        _Option(
            {"a_sound": name if name == "clicks" else f"a {name}"},
            "yes" if name in heard else "no",
            heard=heard.get(name, []),
        )
        for name in SOUNDS
    ]


def _heard_only(scene: Scene) -> list[_Option]:
    answer = _only([sound.name for sound in scene.sounds])
    return [_Option({}, answer, heard=range(len(scene.sounds)))]


def _where_place(scene: Scene) -> list[_Option]:
    return [
        _Option({"sight": words}, scene.sights[who[0]].place or "", who)
        for words, who in _descriptions(scene).items()
        if len(who) == 1
    ]


def _where_motion(scene: Scene) -> list[_Option]:
    return [
        _Option({"sight": words}, scene.sights[who[0]].motion or "", who)
        for words, who in _descriptions(scene).items()
        if len(who) == 1
    ]


def _count_sound(scene: Scene) -> list[_Option]:
    return [
        _Option({"sound": name}, str(len(who)), heard=who) for name, who in _named(scene).items()
    ]


def _count_sounds(scene: Scene) -> list[_Option]:
    return [_Option({}, str(len(scene.sounds)), heard=range(len(scene.sounds)))]


def _count_sights(scene: Scene) -> list[_Option]:
    return [_Option({}, str(len(scene.sights)), range(len(scene.sights)))]


def _count_shape(scene: Scene) -> list[_Option]:
    counts = Counter(sight.shape for sight in scene.sights)
    return [
        _Option(
            {"shape": shape},
            str(count),
            [i for i, sight in enumerate(scene.sights) if sight.shape == shape],
        )
        for shape, count in counts.items()
    ]


def _count_colour(scene: Scene) -> list[_Option]:
    counts = Counter(sight.colour for sight in scene.sights)
    return [
        _Option(
            {"colour": colour},
            str(count),
            [i for i, sight in enumerate(scene.sights) if sight.colour == colour],
        )
        for colour, count in counts.items()
    ]


def _cross_sight(scene: Scene, trait: Callable[[Sight], str]) -> list[_Option]:
    options = []
    for name, heard in _named(scene).items():
        seen = []
        for index in heard:
            seen.append(
                [i for i, s in enumerate(scene.sights) if _together(s, scene.sounds[index])]
            )
        flat = [i for who in seen for i in who]
        if not flat:
            options.append(_Option({"sound": name}, NOTHING, heard=heard))
        elif all(seen):
            answer = _only([trait(scene.sights[i]) for i in flat])
            options.append(_Option({"sound": name}, answer, flat, heard))
    return options


def _cross_colour(scene: Scene) -> list[_Option]:
    return _cross_sight(scene, lambda sight: sight.colour)


def _cross_shape(scene: Scene) -> list[_Option]:
    return _cross_sight(scene, lambda sight: sight.shape)


def _cross_sound(scene: Scene) -> list[_Option]:
    options = []
    for words, seen in _descriptions(scene).items():
        heard = [
            [i for i, s in enumerate(scene.sounds) if _together(s, scene.sights[index])]
            for index in seen
        ]
        flat = [i for who in heard for i in who]
        if not flat:
            options.append(_Option({"sight": words}, NOTHING, seen))
        elif all(heard):
            answer = _only([scene.sounds[i].name for i in flat])
            options.append(_Option({"sight": words}, answer, seen, flat))
    return options


def _order_sights(scene: Scene) -> list[_Option]:
    single = [
        (words, who[0])
        for words, who in _descriptions(scene).items()
        if len(who) == 1 and words == scene.sights[who[0]].name
    ]
    options = []
    for (words, one), (others, other) in product(single, single):
        if one != other:
            first = words if scene.sights[one].start < scene.sights[other].start else others
            options.append(_Option({"sight": words, "other": others}, first, [one, other]))
    return options


def _order_sounds(scene: Scene) -> list[_Option]:
    single = [(name, who[0]) for name, who in _named(scene).items() if len(who) == 1]
    options = []
    for (name, one), (others, other) in product(single, single):
        if one != other:
            first = name if scene.sounds[one].start < scene.sounds[other].start else others
            words = {"sound": name, "other": others}
            options.append(_Option(words, first, heard=[one, other]))
    return options


def _order_sound(scene: Scene) -> list[_Option]:
    last = len(scene.sounds) - 1
    return [
        _Option({"end": "first"}, scene.sounds[0].name, heard=[0]),
        _Option({"end": "last"}, scene.sounds[last].name, heard=[last]),
    ]


def _order_sight(scene: Scene, trait: Callable[[Sight], str]) -> list[_Option]:
    last = len(scene.sights) - 1
    return [
        _Option({"end": "first"}, trait(scene.sights[0]), [0]),
        _Option({"end": "last"}, trait(scene.sights[last]), [last]),
    ]


def _order_shape(scene: Scene) -> list[_Option]:
    return _order_sight(scene, lambda sight: sight.shape)


def _order_colour(scene: Scene) -> list[_Option]:
    return _order_sight(scene, lambda sight: sight.colour)


def _order_mixed(scene: Scene) -> list[_Option]:
    options = []
    for name, heard in _named(scene).items():
        for words, seen in _descriptions(scene).items():
            if len(heard) > 1 or len(seen) > 1:
                continue
            sound, sight = scene.sounds[heard[0]], scene.sights[seen[0]]
            if _together(sound, sight):
                continue
            for when, true in (
                ("before", sound.start < sight.start),
                ("after", sound.start > sight.start),
            ):
                options.append(
                    _Option(
                        {"sound": name, "sight": words, "when": when},
                        "yes" if true else "no",
                        seen,
                        heard,
                    )
                )
    return options


_ASKERS: dict[str, _Asker] = {
    "seen-colour": _seen_colour,
    "seen-shape": _seen_shape,
    "seen-there": _seen_there,
    "heard-there": _heard_there,
    "heard-only": _heard_only,
    "where-place": _where_place,
    "where-motion": _where_motion,
    "count-sound": _count_sound,
    "count-sounds": _count_sounds,
    "count-sights": _count_sights,
    "count-shape": _count_shape,
    "count-colour": _count_colour,
    "cross-colour": _cross_colour,
    "cross-shape": _cross_shape,
    "cross-sound": _cross_sound,
    "order-sights": _order_sights,
    "order-sounds": _order_sounds,
    "order-sound": _order_sound,
    "order-shape": _order_shape,
    "order-colour": _order_colour,
    "order-mixed": _order_mixed,
}
