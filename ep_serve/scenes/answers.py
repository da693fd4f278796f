"""Enumerate the possible questions about a scene, with their answers and evidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

from ep_serve.scenes.scene import COLOURS, SHAPES, SOUNDS, Scene, Sight, Sound

_VALUES: dict[str, Sequence[str]] = {"colour": tuple(COLOURS), "shape": SHAPES}
NOTHING = "nothing"
"""The answer if no shape is shown, or no sound heard, at that time."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible question of one kind.

    Attributes:
        words: Values of the placeholders of a wording.
        answer: Empty if there is no unique right answer.
        seen: Indices of the sights that are evidence for the answer.
        heard: Indices of the sounds that are evidence for the answer.
    """

    words: dict[str, str]
    answer: str
    seen: Sequence[int] = ()
    heard: Sequence[int] = ()


CandidateFinder = Callable[[Scene], list[Candidate]]


def find_candidates(scene: Scene, kind: str) -> list[Candidate]:
    """Find all questions of a kind that have a unique right answer."""
    return [option for option in _FINDERS[kind](scene) if option.answer]


def _sights_by_description(scene: Scene) -> dict[str, list[int]]:
    """{description by colour, shape or both: indices of the sights it fits}."""
    found: dict[str, list[int]] = {}
    for index, sight in enumerate(scene.sights):
        for words in (sight.name, sight.shape, f"{sight.colour} shape"):
            found.setdefault(words, []).append(index)
    return found


def _sounds_by_name(scene: Scene) -> dict[str, list[int]]:
    """{name: indices of the sounds}."""
    found: dict[str, list[int]] = {}
    for index, sound in enumerate(scene.sounds):
        found.setdefault(sound.name, []).append(index)
    return found


def _overlap(one: Sight | Sound, other: Sight | Sound) -> bool:
    return one.start < other.end and other.start < one.end


def _common_value(values: Sequence[str]) -> str:
    """The value that all share, or an empty string."""
    return values[0] if len(set(values)) == 1 else ""


def _seen(scene: Scene, known: str, asked: str) -> list[Candidate]:
    """The trait `asked` of the sights with a given value of the trait `known`."""
    candidates = []
    for value in _VALUES[known]:
        indices = _with_trait(scene, known, value)
        answer = _common_value([getattr(scene.sights[i], asked) for i in indices])
        candidates.append(Candidate({known: value}, answer, indices))
    return candidates


def _with_trait(scene: Scene, trait: str, value: str) -> list[int]:
    return [i for i, sight in enumerate(scene.sights) if getattr(sight, trait) == value]


def _seen_there(scene: Scene) -> list[Candidate]:
    shown = _sights_by_description(scene)
    colours = {sight.colour for sight in scene.sights}
    shapes = {sight.shape for sight in scene.sights}
    options = []
    for colour, shape in product(COLOURS, SHAPES):
        indices = shown.get(f"{colour} {shape}", [])
        # A question about something of which no part was shown would be too easy.
        if indices or colour in colours or shape in shapes:
            words = {"colour": colour, "shape": shape}
            options.append(Candidate(words, "yes" if indices else "no", indices))
    return options


def _heard_there(scene: Scene) -> list[Candidate]:
    heard = _sounds_by_name(scene)
    return [
        Candidate(
            {"a_sound": name if name == "clicks" else f"a {name}"},
            "yes" if name in heard else "no",
            heard=heard.get(name, []),
        )
        for name in SOUNDS
    ]


def _heard_only(scene: Scene) -> list[Candidate]:
    answer = _common_value([sound.name for sound in scene.sounds])
    return [Candidate({}, answer, heard=range(len(scene.sounds)))]


def _where(scene: Scene, trait: str) -> list[Candidate]:
    return [
        Candidate({"sight": words}, getattr(scene.sights[indices[0]], trait) or "", indices)
        for words, indices in _sights_by_description(scene).items()
        if len(indices) == 1
    ]


def _count_sound(scene: Scene) -> list[Candidate]:
    return [
        Candidate({"sound": name}, str(len(indices)), heard=indices)
        for name, indices in _sounds_by_name(scene).items()
    ]


def _count_trait(scene: Scene, trait: str) -> list[Candidate]:
    candidates = []
    for value in dict.fromkeys(getattr(sight, trait) for sight in scene.sights):
        indices = _with_trait(scene, trait, value)
        candidates.append(Candidate({trait: value}, str(len(indices)), indices))
    return candidates


def _cross_sight(scene: Scene, trait: str) -> list[Candidate]:
    options = []
    for name, heard in _sounds_by_name(scene).items():
        seen = []
        for index in heard:
            seen.append([i for i, s in enumerate(scene.sights) if _overlap(s, scene.sounds[index])])
        flat = [i for indices in seen for i in indices]
        if not flat:
            options.append(Candidate({"sound": name}, NOTHING, heard=heard))
        elif all(seen):
            answer = _common_value([getattr(scene.sights[i], trait) for i in flat])
            options.append(Candidate({"sound": name}, answer, flat, heard))
    return options


def _cross_sound(scene: Scene) -> list[Candidate]:
    options = []
    for words, seen in _sights_by_description(scene).items():
        heard = [
            [i for i, s in enumerate(scene.sounds) if _overlap(s, scene.sights[index])]
            for index in seen
        ]
        flat = [i for indices in heard for i in indices]
        if not flat:
            options.append(Candidate({"sight": words}, NOTHING, seen))
        elif all(heard):
            answer = _common_value([scene.sounds[i].name for i in flat])
            options.append(Candidate({"sight": words}, answer, seen, flat))
    return options


def _order_sights(scene: Scene) -> list[Candidate]:
    single = [
        (words, indices[0])
        for words, indices in _sights_by_description(scene).items()
        if len(indices) == 1 and words == scene.sights[indices[0]].name
    ]
    options = []
    for (words, one), (others, other) in product(single, single):
        if one != other:
            first = words if scene.sights[one].start < scene.sights[other].start else others
            options.append(Candidate({"sight": words, "other": others}, first, [one, other]))
    return options


def _order_sounds(scene: Scene) -> list[Candidate]:
    single = [
        (name, indices[0]) for name, indices in _sounds_by_name(scene).items() if len(indices) == 1
    ]
    options = []
    for (name, one), (others, other) in product(single, single):
        if one != other:
            first = name if scene.sounds[one].start < scene.sounds[other].start else others
            words = {"sound": name, "other": others}
            options.append(Candidate(words, first, heard=[one, other]))
    return options


def _order_sound(scene: Scene) -> list[Candidate]:
    last = len(scene.sounds) - 1
    return [
        Candidate({"end": "first"}, scene.sounds[0].name, heard=[0]),
        Candidate({"end": "last"}, scene.sounds[last].name, heard=[last]),
    ]


def _order_sight(scene: Scene, trait: str) -> list[Candidate]:
    last = len(scene.sights) - 1
    return [
        Candidate({"end": "first"}, getattr(scene.sights[0], trait), [0]),
        Candidate({"end": "last"}, getattr(scene.sights[last], trait), [last]),
    ]


def _order_mixed(scene: Scene) -> list[Candidate]:
    options = []
    for name, heard in _sounds_by_name(scene).items():
        for words, seen in _sights_by_description(scene).items():
            if len(heard) > 1 or len(seen) > 1:
                continue
            sound, sight = scene.sounds[heard[0]], scene.sights[seen[0]]
            if _overlap(sound, sight):
                continue
            for when, true in (
                ("before", sound.start < sight.start),
                ("after", sound.start > sight.start),
            ):
                options.append(
                    Candidate(
                        {"sound": name, "sight": words, "when": when},
                        "yes" if true else "no",
                        seen,
                        heard,
                    )
                )
    return options


_FINDERS: dict[str, CandidateFinder] = {
    "seen-colour": partial(_seen, known="shape", asked="colour"),
    "seen-shape": partial(_seen, known="colour", asked="shape"),
    "seen-there": _seen_there,
    "heard-there": _heard_there,
    "heard-only": _heard_only,
    "where-place": partial(_where, trait="place"),
    "where-motion": partial(_where, trait="motion"),
    "count-sound": _count_sound,
    "count-sounds": lambda scene: [
        Candidate({}, str(len(scene.sounds)), heard=range(len(scene.sounds)))
    ],
    "count-sights": lambda scene: [Candidate({}, str(len(scene.sights)), range(len(scene.sights)))],
    "count-shape": partial(_count_trait, trait="shape"),
    "count-colour": partial(_count_trait, trait="colour"),
    "cross-colour": partial(_cross_sight, trait="colour"),
    "cross-shape": partial(_cross_sight, trait="shape"),
    "cross-sound": _cross_sound,
    "order-sights": _order_sights,
    "order-sounds": _order_sounds,
    "order-sound": _order_sound,
    "order-shape": partial(_order_sight, trait="shape"),
    "order-colour": partial(_order_sight, trait="colour"),
    "order-mixed": _order_mixed,
}
