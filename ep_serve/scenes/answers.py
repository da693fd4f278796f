"""Everything that can be asked about a scene: the words to fill in, the answer, the evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from ep_serve.scenes.scene import COLOURS, SHAPES, SOUNDS, Scene, Sight, Sound

NOTHING = "nothing"
"""The answer where nothing was shown, or nothing heard, at the asked time."""


@dataclass(frozen=True, slots=True)
class Option:
    """A question that could be asked.

    Attributes:
        words: What is filled into a wording.
        answer: Empty where there is no single right one.
        seen: Indices of the scene's sights that the answer rests on.
        heard: The same for its sounds.
    """

    words: dict[str, str]
    answer: str
    seen: Sequence[int] = ()
    heard: Sequence[int] = ()


Finder = Callable[[Scene], list[Option]]


def find_options(scene: Scene, kind: str) -> list[Option]:
    """Every question of a kind that has one right answer."""
    return [option for option in _FINDERS[kind](scene) if option.answer]


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


def _seen_colour(scene: Scene) -> list[Option]:
    options = []
    for shape in SHAPES:
        who = [i for i, sight in enumerate(scene.sights) if sight.shape == shape]
        answer = _only([scene.sights[i].colour for i in who])
        options.append(Option({"shape": shape}, answer, who))
    return options


def _seen_shape(scene: Scene) -> list[Option]:
    options = []
    for colour in COLOURS:
        who = [i for i, sight in enumerate(scene.sights) if sight.colour == colour]
        answer = _only([scene.sights[i].shape for i in who])
        options.append(Option({"colour": colour}, answer, who))
    return options


def _seen_there(scene: Scene) -> list[Option]:
    shown = _descriptions(scene)
    colours = {sight.colour for sight in scene.sights}
    shapes = {sight.shape for sight in scene.sights}
    options = []
    for colour, shape in product(COLOURS, SHAPES):
        who = shown.get(f"{colour} {shape}", [])
        # A question about something of which no part was shown would be too easy.
        if who or colour in colours or shape in shapes:
            words = {"colour": colour, "shape": shape}
            options.append(Option(words, "yes" if who else "no", who))
    return options


def _heard_there(scene: Scene) -> list[Option]:
    heard = _named(scene)
    return [
        Option(
            {"a_sound": name if name == "clicks" else f"a {name}"},
            "yes" if name in heard else "no",
            heard=heard.get(name, []),
        )
        for name in SOUNDS
    ]


def _heard_only(scene: Scene) -> list[Option]:
    answer = _only([sound.name for sound in scene.sounds])
    return [Option({}, answer, heard=range(len(scene.sounds)))]


def _where_place(scene: Scene) -> list[Option]:
    return [
        Option({"sight": words}, scene.sights[who[0]].place or "", who)
        for words, who in _descriptions(scene).items()
        if len(who) == 1
    ]


def _where_motion(scene: Scene) -> list[Option]:
    return [
        Option({"sight": words}, scene.sights[who[0]].motion or "", who)
        for words, who in _descriptions(scene).items()
        if len(who) == 1
    ]


def _count_sound(scene: Scene) -> list[Option]:
    return [
        Option({"sound": name}, str(len(who)), heard=who) for name, who in _named(scene).items()
    ]


def _count_sounds(scene: Scene) -> list[Option]:
    return [Option({}, str(len(scene.sounds)), heard=range(len(scene.sounds)))]


def _count_sights(scene: Scene) -> list[Option]:
    return [Option({}, str(len(scene.sights)), range(len(scene.sights)))]


def _count_shape(scene: Scene) -> list[Option]:
    counts = Counter(sight.shape for sight in scene.sights)
    return [
        Option(
            {"shape": shape},
            str(count),
            [i for i, sight in enumerate(scene.sights) if sight.shape == shape],
        )
        for shape, count in counts.items()
    ]


def _count_colour(scene: Scene) -> list[Option]:
    counts = Counter(sight.colour for sight in scene.sights)
    return [
        Option(
            {"colour": colour},
            str(count),
            [i for i, sight in enumerate(scene.sights) if sight.colour == colour],
        )
        for colour, count in counts.items()
    ]


def _cross_sight(scene: Scene, trait: Callable[[Sight], str]) -> list[Option]:
    options = []
    for name, heard in _named(scene).items():
        seen = []
        for index in heard:
            seen.append(
                [i for i, s in enumerate(scene.sights) if _together(s, scene.sounds[index])]
            )
        flat = [i for who in seen for i in who]
        if not flat:
            options.append(Option({"sound": name}, NOTHING, heard=heard))
        elif all(seen):
            answer = _only([trait(scene.sights[i]) for i in flat])
            options.append(Option({"sound": name}, answer, flat, heard))
    return options


def _cross_colour(scene: Scene) -> list[Option]:
    return _cross_sight(scene, lambda sight: sight.colour)


def _cross_shape(scene: Scene) -> list[Option]:
    return _cross_sight(scene, lambda sight: sight.shape)


def _cross_sound(scene: Scene) -> list[Option]:
    options = []
    for words, seen in _descriptions(scene).items():
        heard = [
            [i for i, s in enumerate(scene.sounds) if _together(s, scene.sights[index])]
            for index in seen
        ]
        flat = [i for who in heard for i in who]
        if not flat:
            options.append(Option({"sight": words}, NOTHING, seen))
        elif all(heard):
            answer = _only([scene.sounds[i].name for i in flat])
            options.append(Option({"sight": words}, answer, seen, flat))
    return options


def _order_sights(scene: Scene) -> list[Option]:
    single = [
        (words, who[0])
        for words, who in _descriptions(scene).items()
        if len(who) == 1 and words == scene.sights[who[0]].name
    ]
    options = []
    for (words, one), (others, other) in product(single, single):
        if one != other:
            first = words if scene.sights[one].start < scene.sights[other].start else others
            options.append(Option({"sight": words, "other": others}, first, [one, other]))
    return options


def _order_sounds(scene: Scene) -> list[Option]:
    single = [(name, who[0]) for name, who in _named(scene).items() if len(who) == 1]
    options = []
    for (name, one), (others, other) in product(single, single):
        if one != other:
            first = name if scene.sounds[one].start < scene.sounds[other].start else others
            words = {"sound": name, "other": others}
            options.append(Option(words, first, heard=[one, other]))
    return options


def _order_sound(scene: Scene) -> list[Option]:
    last = len(scene.sounds) - 1
    return [
        Option({"end": "first"}, scene.sounds[0].name, heard=[0]),
        Option({"end": "last"}, scene.sounds[last].name, heard=[last]),
    ]


def _order_sight(scene: Scene, trait: Callable[[Sight], str]) -> list[Option]:
    last = len(scene.sights) - 1
    return [
        Option({"end": "first"}, trait(scene.sights[0]), [0]),
        Option({"end": "last"}, trait(scene.sights[last]), [last]),
    ]


def _order_shape(scene: Scene) -> list[Option]:
    return _order_sight(scene, lambda sight: sight.shape)


def _order_colour(scene: Scene) -> list[Option]:
    return _order_sight(scene, lambda sight: sight.colour)


def _order_mixed(scene: Scene) -> list[Option]:
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
                    Option(
                        {"sound": name, "sight": words, "when": when},
                        "yes" if true else "no",
                        seen,
                        heard,
                    )
                )
    return options


_FINDERS: dict[str, Finder] = {
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
