"""Traverse parsed JSON: collect strings, check numbers and locate values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ep_serve.gateway.errors import invalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MAX_PLACE = 200
"""Maximum length of a path in error messages; keys can have any length."""
_MIN_INT = -(2**63)
_MAX_INT = 2**64 - 1


@dataclass(slots=True)
class Leaves:
    """Strings and keys of a JSON value, in document order."""

    strings: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    representable: bool = True
    """Whether all numbers are finite and all integers have at most 64 bits."""

    def add(self, value: Any) -> None:
        if isinstance(value, str):
            self.strings.append(value)
        elif isinstance(value, list):
            for item in value:
                self.add(item)
        elif isinstance(value, dict):
            self.keys.extend(value)
            for item in value.values():
                self.add(item)
        elif not _is_representable(value):
            self.representable = False


def check_numbers(body: dict[str, Any], leaves: Leaves) -> None:
    """Reject numbers that not every JSON parser can represent.

    Raises:
        ApiError: 400 with the path of the number.
    """
    if leaves.representable:
        return
    place = find_leaf(body, lambda leaf: not _is_representable(leaf))
    raise invalid(f"{place} must be a finite number of at most 64 bits.", place)


def find_leaf(value: Any, predicate: Callable[[Any], bool]) -> str | None:
    """Return the path of the first leaf or key that matches a predicate, or None."""
    for place, leaf in _places(value, ""):
        if predicate(leaf):
            return place if len(place) <= _MAX_PLACE else f"{place[:_MAX_PLACE]}..."
    return None


def has_surrogate(leaf: Any) -> bool:
    """Return whether a string contains a lone surrogate, which UTF-8 cannot encode."""
    return isinstance(leaf, str) and any("\ud800" <= character <= "\udfff" for character in leaf)


def _is_representable(leaf: Any) -> bool:
    if isinstance(leaf, float):
        return math.isfinite(leaf)
    return not isinstance(leaf, int) or _MIN_INT <= leaf <= _MAX_INT


def _places(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _places(item, f"{place}[{index}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            below = f"{place}.{key[:64]}" if place else key[:64]
            yield below, key
            yield from _places(item, below)
    else:
        yield place, value
