"""Synthetic scenes: coloured shapes and sounds, each in its own time span.

Time is cut into slots of whole seconds. In a slot a shape is shown, a sound is heard, or both; the
rest of the clip is a still background and silence. At least three slots hold both, so that the
events of a clip alone say little about which of them co-occur.
"""

from __future__ import annotations

from dataclasses import dataclass

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
"""Centre of a shape at rest, as shares of width and height."""
MOTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
}

MIN_SHARED_SLOTS = 3
"""Minimum number of slots with both a shape and a sound."""
MAX_SLOTS = 8
MAX_OFFSET = 0.12
"""Maximum seconds by which a sound starts late, or ends early, in its slot.

A shape fills its slot: with two frames a second, one missing frame would hide where it moves.
"""
MOVING_SHARE = 0.35
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
    """Description of one clip; `seed` determines everything else when it is rendered."""

    seed: int
    seconds: int
    sights: tuple[Sight, ...]
    sounds: tuple[Sound, ...]

    def sight_in(self, second: int) -> Sight | None:
        """The shape on the screen in a second of the clip."""
        middle = second + 0.5
        return next((sight for sight in self.sights if sight.start < middle < sight.end), None)


def make_scene(seed: int, seconds: int) -> Scene:
    """Generate a scene, deterministic in its arguments.

    Raises:
        ValueError: Fewer than four seconds.
    """
    if seconds < MIN_SHARED_SLOTS + 1:
        raise ValueError(f"seconds must be at least {MIN_SHARED_SLOTS + 1}, not {seconds}")
    rng = np.random.default_rng([seed, seconds])
    spans = _spans(rng, seconds)
    seen, heard = _assign_slots(rng, len(spans))
    appearances = _appearances(rng, _adjacent(spans, seen))
    names = _names(rng, _adjacent(spans, heard))
    return Scene(
        seed=seed,
        seconds=seconds,
        sights=tuple(
            _sight(rng, spans[slot], appearance)
            for slot, appearance in zip(seen, appearances, strict=True)
        ),
        sounds=tuple(
            _sound(rng, spans[slot], name) for slot, name in zip(heard, names, strict=True)
        ),
    )


def _spans(rng: np.random.Generator, seconds: int) -> list[tuple[int, int]]:
    """Time slots in order: (first second, one past the last)."""
    most = min(MAX_SLOTS, max(MIN_SHARED_SLOTS, seconds // 2 + 1))
    count = int(rng.integers(MIN_SHARED_SLOTS, most + 1))
    lengths = np.ones(count, dtype=np.int64)
    free = seconds - count
    for slot in range(count):
        if free > 1 and rng.random() < 0.25:
            lengths[slot] += 1
            free -= 1
    gaps = np.bincount(rng.integers(0, count + 1, free), minlength=count + 1)
    ends = np.cumsum(gaps[:count] + lengths)
    return [(int(end - length), int(end)) for end, length in zip(ends, lengths, strict=True)]


def _assign_slots(rng: np.random.Generator, count: int) -> tuple[list[int], list[int]]:
    """Slots with a shape, and slots with a sound."""
    order = rng.permutation(count)
    kinds = rng.choice(["both", "sight", "sound"], count, p=[0.3, 0.35, 0.35])
    kinds[order[:MIN_SHARED_SLOTS]] = "both"
    seen = [slot for slot in range(count) if kinds[slot] != "sound"]
    heard = [slot for slot in range(count) if kinds[slot] != "sight"]
    return seen, heard


def _adjacent(spans: list[tuple[int, int]], slots: list[int]) -> list[bool]:
    """For each slot, whether it starts where the previous one ends."""
    ends = [-1, *(spans[slot][1] for slot in slots)]
    return [spans[slot][0] == end for slot, end in zip(slots, ends, strict=False)]


def _appearances(rng: np.random.Generator, touching: list[bool]) -> list[tuple[str, str]]:
    """Colour and shape of each sight: all different, or repeated from a small set."""
    count = len(touching)
    everything = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    if rng.random() < 0.55:
        colours = [str(c) for c in _shuffled_names(rng, tuple(COLOURS), count)]
        shapes = [str(s) for s in _shuffled_names(rng, SHAPES, count)]
        return list(zip(colours, shapes, strict=True))
    few = [everything[i] for i in rng.permutation(len(everything))[: rng.integers(2, 4)]]
    return [few[i] for i in _repeating_choices(rng, len(few), touching)]


def _names(rng: np.random.Generator, touching: list[bool]) -> list[str]:
    """The name of each sound, chosen in the same way."""
    count = len(touching)
    if not any(touching) and rng.random() < 0.25:
        return [str(rng.choice(SOUNDS))] * count
    if rng.random() < 0.55:
        return _shuffled_names(rng, SOUNDS, count)
    few = _shuffled_names(rng, SOUNDS, int(rng.integers(2, 4)))
    return [few[i] for i in _repeating_choices(rng, len(few), touching)]


def _shuffled_names(rng: np.random.Generator, names: tuple[str, ...], count: int) -> list[str]:
    """Names in random order, repeated only once all were used."""
    shuffled = [names[i] for i in rng.permutation(len(names))]
    return [shuffled[i % len(shuffled)] for i in range(count)]


def _repeating_choices(rng: np.random.Generator, choices: int, touching: list[bool]) -> list[int]:
    """Random choices; adjacent events differ, so that both can be counted."""
    chosen: list[int] = []
    for touches in touching:
        choice = int(rng.integers(choices))
        if touches and choice == chosen[-1]:
            choice = (choice + 1) % choices
        chosen.append(choice)
    return chosen


def _sight(rng: np.random.Generator, span: tuple[int, int], appearance: tuple[str, str]) -> Sight:
    moves = rng.random() < MOVING_SHARE
    return Sight(
        start=float(span[0]),
        end=float(span[1]),
        colour=appearance[0],
        shape=appearance[1],
        place=None if moves else str(rng.choice(list(PLACES))),
        motion=str(rng.choice(list(MOTIONS))) if moves else None,
        radius=rng.uniform(0.17, 0.24),
    )


def _sound(rng: np.random.Generator, span: tuple[int, int], name: str) -> Sound:
    return Sound(
        start=span[0] + rng.uniform(0.02, MAX_OFFSET),
        end=span[1] - rng.uniform(0.02, MAX_OFFSET),
        name=name,
        pitch=rng.random(),
        loudness=rng.uniform(0.25, 1.0),
    )
