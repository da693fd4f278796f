"""What happens in a made-up clip: coloured shapes and sounds, each at its own time.

Time is cut into slots of whole seconds. In a slot a shape is shown, a sound is heard, or both; the
rest of the clip is a still background and silence. At least three slots hold both, so that knowing
what co-occurs somewhere in a clip says little about what co-occurs when.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 35, 35),
    "green": (30, 175, 50),
    "blue": (40, 75, 235),
    "yellow": (245, 220, 40),
    "purple": (165, 50, 200),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
SOUNDS = ("beep", "chirp", "siren", "clicks", "noise", "buzz")
PLACES: dict[str, tuple[float, float]] = {
    "left": (0.2, 0.5),
    "right": (0.8, 0.5),
    "top": (0.5, 0.22),
    "bottom": (0.5, 0.78),
    "middle": (0.5, 0.5),
}
"""Where a still shape is: its centre as shares of width and height."""
MOTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}

LEAST_SHARED = 3
"""Slots with both a shape and a sound."""
MOST_SLOTS = 8
LATE = 0.12
"""Seconds by which a sound may begin late, or end early, in its slot.

A shape fills its slot: with two frames a second, one missing frame would hide where it moves.
"""
MOVING = 0.35
"""Share of the shapes that move."""


@dataclass(frozen=True, slots=True)
class Sight:
    """A shape on the screen from `start` to `end` seconds.

    It either stays at `place` or moves in the direction `motion`; the other one is None.
    """

    start: float
    end: float
    colour: str
    shape: str
    place: str | None
    motion: str | None
    radius: float
    """Half its size, as a share of the shorter side of the picture."""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Sound:
    """A sound from `start` to `end` seconds; `pitch` and `loudness` lie between 0 and 1."""

    start: float
    end: float
    name: str
    pitch: float
    loudness: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip, before it is drawn. `seed` decides everything that is not said here."""

    seed: int
    seconds: int
    sights: tuple[Sight, ...]
    sounds: tuple[Sound, ...]

    def sight_in(self, second: int) -> Sight | None:
        """The shape that is shown in a second of the clip."""
        return _in_second(self.sights, second)

    def sound_in(self, second: int) -> Sound | None:
        """The sound that is heard in a second of the clip."""
        return _in_second(self.sounds, second)


_Thing = TypeVar("_Thing", Sight, Sound)


def make_scene(seed: int, seconds: int) -> Scene:
    """A scene of whole seconds, the same for the same arguments.

    Raises:
        ValueError: Fewer than four seconds.
    """
    if seconds < LEAST_SHARED + 1:
        raise ValueError(f"seconds must be at least {LEAST_SHARED + 1}, not {seconds}")
    rng = np.random.default_rng([seed, seconds])
    spans = _spans(rng, seconds)
    seen, heard = _what_slots_hold(rng, len(spans))
    looks = _looks(rng, _next_to_each_other(spans, seen))
    names = _names(rng, _next_to_each_other(spans, heard))
    return Scene(
        seed=seed,
        seconds=seconds,
        sights=tuple(
            _sight(rng, spans[slot], look) for slot, look in zip(seen, looks, strict=True)
        ),
        sounds=tuple(
            _sound(rng, spans[slot], name) for slot, name in zip(heard, names, strict=True)
        ),
    )


def _in_second(things: tuple[_Thing, ...], second: int) -> _Thing | None:
    middle = second + 0.5
    return next((thing for thing in things if thing.start < middle < thing.end), None)


def _spans(rng: np.random.Generator, seconds: int) -> list[tuple[int, int]]:
    """Slots in order: (first second, one past the last)."""
    most = min(MOST_SLOTS, max(LEAST_SHARED, seconds // 2 + 1))
    count = int(rng.integers(LEAST_SHARED, most + 1))
    lengths = np.ones(count, dtype=np.int64)
    free = seconds - count
    for slot in range(count):
        if free > 1 and rng.random() < 0.25:
            lengths[slot] += 1
            free -= 1
    gaps = np.bincount(rng.integers(0, count + 1, free), minlength=count + 1)
    ends = np.cumsum(gaps[:count] + lengths)
    return [(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]


def _what_slots_hold(rng: np.random.Generator, count: int) -> tuple[list[int], list[int]]:
    """Slots with a shape, and slots with a sound."""
    order = rng.permutation(count)
    kinds = rng.choice(["both", "sight", "sound"], count, p=[0.3, 0.35, 0.35])
    kinds[order[:LEAST_SHARED]] = "both"
    seen = [slot for slot in range(count) if kinds[slot] != "sound"]
    heard = [slot for slot in range(count) if kinds[slot] != "sight"]
    return seen, heard


def _next_to_each_other(spans: list[tuple[int, int]], slots: list[int]) -> list[bool]:
    """For each of some slots, whether it begins where the one before ends."""
    ends = [-1, *(spans[slot][1] for slot in slots)]
    return [spans[slot][0] == end for slot, end in zip(slots, ends, strict=False)]


def _looks(rng: np.random.Generator, touching: list[bool]) -> list[tuple[str, str]]:
    """Colour and shape of each sight: all different, or out of a few that come back."""
    count = len(touching)
    everything = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    if rng.random() < 0.55:
        colours = [str(c) for c in _different(rng, tuple(COLOURS), count)]
        shapes = [str(s) for s in _different(rng, SHAPES, count)]
        return list(zip(colours, shapes, strict=True))
    few = [everything[i] for i in rng.permutation(len(everything))[: rng.integers(2, 4)]]
    return [few[i] for i in _come_back(rng, len(few), touching)]


def _names(rng: np.random.Generator, touching: list[bool]) -> list[str]:
    """The name of each sound, chosen in the same way."""
    count = len(touching)
    if not any(touching) and rng.random() < 0.25:
        return [str(rng.choice(SOUNDS))] * count
    if rng.random() < 0.55:
        return _different(rng, SOUNDS, count)
    few = _different(rng, SOUNDS, int(rng.integers(2, 4)))
    return [few[i] for i in _come_back(rng, len(few), touching)]


def _different(rng: np.random.Generator, names: tuple[str, ...], count: int) -> list[str]:
    """Names in random order, each once before one comes a second time."""
    shuffled = [names[i] for i in rng.permutation(len(names))]
    return [shuffled[i % len(shuffled)] for i in range(count)]


def _come_back(rng: np.random.Generator, choices: int, touching: list[bool]) -> list[int]:
    """Random choices; what touches the one before differs from it, so that both can be counted."""
    chosen: list[int] = []
    for touches in touching:
        choice = int(rng.integers(choices))
        if touches and choice == chosen[-1]:
            choice = (choice + 1) % choices
        chosen.append(choice)
    return chosen


def _sight(rng: np.random.Generator, span: tuple[int, int], look: tuple[str, str]) -> Sight:
    moves = rng.random() < MOVING
    return Sight(
        start=float(span[0]),
        end=float(span[1]),
        colour=look[0],
        shape=look[1],
        place=None if moves else str(rng.choice(list(PLACES))),
        motion=str(rng.choice(list(MOTIONS))) if moves else None,
        radius=rng.uniform(0.17, 0.24),
    )


def _sound(rng: np.random.Generator, span: tuple[int, int], name: str) -> Sound:
    return Sound(
        start=span[0] + rng.uniform(0.02, LATE),
        end=span[1] - rng.uniform(0.02, LATE),
        name=name,
        pitch=rng.random(),
        loudness=rng.uniform(0.25, 1.0),
    )
