"""JSON schemas that an answer can be bound to: what they may hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ep_serve.contract.errors import FieldError
from ep_serve.contract.expressions import (
    COMPRESSED,
    MAX_ADJACENT,
    MAX_REPEAT,
    MAX_STATES,
    Shape,
    parse_regex,
    shape,
)
from ep_serve.contract.finite import AndOrGraph

MAX_DEPTH = 64
"""Objects and arrays inside each other."""
MAX_VALUES = 10_000
"""JSON values of all schemas of a request."""
MAX_CHARS = 262_144
"""Characters of all names and strings in them."""
MAX_PROPERTIES = 256
"""Properties of one object; optional ones cost their square."""
MAX_LENGTH = 1_000_000
"""Largest `minLength` and `maxLength`."""
MAX_PATTERN_CHARS = 8_192

_COUNTS = {
    "minItems": MAX_REPEAT,
    "maxItems": MAX_REPEAT,
    "minProperties": MAX_REPEAT,
    "maxProperties": MAX_REPEAT,
    "minContains": MAX_REPEAT,
    "maxContains": MAX_REPEAT,
    "minLength": MAX_LENGTH,
    "maxLength": MAX_LENGTH,
}
_MAPS = ("properties", "patternProperties")
_LISTS = ("prefixItems", "anyOf", "oneOf", "allOf")
_SINGLE = ("items", "additionalProperties", "unevaluatedItems", "unevaluatedProperties")


@dataclass
class Costs:
    """What the constraints of one request cost together."""

    values: int = 0
    chars: int = 0
    states: int = 0

    def take(self, field: str, *, values: int = 0, chars: int = 0, states: int = 0) -> None:
        """Add JSON values, the characters in them and states of automata.

        Raises:
            FieldError: names the field that exceeds a limit.
        """
        self.values += values
        self.chars += chars
        self.states += states
        if self.values > MAX_VALUES:
            raise FieldError(field, f"has more than {MAX_VALUES} values, with those before it")
        if self.chars > MAX_CHARS:
            raise FieldError(field, f"has more than {MAX_CHARS} characters, with those before it")
        if self.states > MAX_STATES:
            raise FieldError(
                field,
                f"takes {self.states} states with those before it (characters of bounded strings "
                f"and classes of patterns, repetitions written out); the limit is {MAX_STATES}",
            )


def check_schema(field: str, schema: Any, costs: Costs) -> None:
    """Check a JSON schema and add what it costs.

    Raises:
        FieldError: names the field; size, nesting, a number, a pattern, endless recursion.
    """
    lengths: set[tuple[int, int]] = set()
    for place in objects(field, schema, costs):
        for name, limit in _COUNTS.items():
            value = place.get(name)
            if isinstance(value, int | float) and value > limit:
                shown = value if value < 10**18 else "1e18 or more"
                raise FieldError(field, f"has {name} {shown}; the limit is {limit}")
        for name in _MAPS:
            if len(_mapping(place, name)) > MAX_PROPERTIES:
                raise FieldError(field, f"has an object of more than {MAX_PROPERTIES} {name}")
        patterns = [place.get("pattern"), *_mapping(place, "patternProperties")]
        for pattern in patterns:
            if isinstance(pattern, str):
                check_regex(field, pattern, costs)
        lengths.add((_length(place, "minLength"), _length(place, "maxLength")))
    costs.take(field, states=sum(min(high or low, COMPRESSED) for low, high in lengths))
    _refuse_endless(field, schema)


def check_regex(field: str, pattern: str, costs: Costs) -> Shape:
    """Check a regular expression, add what it costs and return its shape.

    Raises:
        FieldError: names the field; length, nesting, repetitions, adjacent optional parts.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise FieldError(
            field,
            f"has a pattern of {len(pattern)} characters; the limit is {MAX_PATTERN_CHARS}",
        )
    rules: dict[str, Shape] = {}  # a regular expression refers to none
    found = shape(parse_regex(field, pattern), rules.__getitem__)
    check_shape(field, found, costs)
    return found


def check_shape(field: str, found: Shape, costs: Costs) -> None:
    """Add what an expression costs.

    Raises:
        FieldError: names the field; adjacent parts that may be empty or repeat, states.
    """
    if found.adjacent > MAX_ADJACENT:
        raise FieldError(
            field,
            f"has more than {MAX_ADJACENT} parts that may be empty or repeat, without fixed text "
            "between them",
        )
    costs.take(field, states=found.states)


def objects(
    field: str, value: Any, costs: Costs, depth: int = MAX_DEPTH
) -> Iterator[dict[str, Any]]:
    """Yield the objects in a JSON value, outer ones first, and count its values.

    Raises:
        FieldError: names the field; too many values, or nested too deep.
    """
    level = [value]
    for _ in range(depth + 1):
        chars = sum(len(item) for item in level if isinstance(item, str))
        costs.take(field, values=len(level), chars=chars)
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                costs.take(field, chars=sum(map(len, item)))
                yield item
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return
        level = below
    raise FieldError(field, f"nests objects and arrays deeper than {depth}")


def _mapping(place: dict[str, Any], name: str) -> dict[str, Any]:
    value = place.get(name)
    return value if isinstance(value, dict) else {}


def _length(place: dict[str, Any], name: str) -> int:
    value = place.get(name)
    return int(value) if isinstance(value, int | float) and value > 0 else 0


def _refuse_endless(field: str, schema: Any) -> None:
    """Refuse a schema that only endless documents match, in any place that an answer may reach."""
    graph = _SchemaGraph(schema)
    holding = graph.graph.solve()
    endless = next((where for where, node in graph.places.items() if node not in holding), None)
    if endless is not None:
        raise FieldError(field, f"has a $ref to {endless} that no finite document matches")


class _SchemaGraph:
    """A node for each schema that is reached from the root; only a `$ref` can make a cycle."""

    def __init__(self, root: Any) -> None:
        self.graph = AndOrGraph()
        self.places: dict[str, int] = {}
        """Nodes by the JSON pointer under which they are referred to."""
        self._root = root
        self._waiting: list[tuple[int, Any]] = []
        self._target("#")
        while self._waiting:
            node, target = self._waiting.pop()
            self.graph.require_all(node, [self._add(target)])

    def _target(self, pointer: str) -> int:
        if pointer not in self.places:
            self.places[pointer] = node = self.graph.add()
            self._waiting.append((node, _resolve(self._root, pointer)))
        return self.places[pointer]

    def _add(self, schema: Any) -> int:
        """A node that holds when a finite document matches the schema, as far as is known."""
        if not isinstance(schema, dict):
            return self.graph.require_all(self.graph.add(), [])
        needed = []
        if isinstance(pointer := schema.get("$ref"), str):
            needed.append(self._target(pointer[:256]))
        properties = {
            name: self._add(value) for name, value in _mapping(schema, "properties").items()
        }
        required = schema.get("required")
        for name in required if isinstance(required, list) else []:
            if isinstance(name, str) and name in properties:
                needed.append(properties[name])
        for value in _mapping(schema, "patternProperties").values():
            self._add(value)
        lists = {name: [self._add(v) for v in _listed(schema, name)] for name in _LISTS}
        needed += lists["allOf"]
        for name in ("anyOf", "oneOf"):
            if lists[name]:
                needed.append(self.graph.require_one(self.graph.add(), lists[name]))
        single = {name: self._add(schema[name]) for name in _SINGLE if name in schema}
        least = _length(schema, "minItems")
        needed += lists["prefixItems"][:least]
        if least > len(lists["prefixItems"]) and "items" in single:
            needed.append(single["items"])
        return self.graph.require_all(self.graph.add(), needed)


def _listed(schema: dict[str, Any], name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


def _resolve(root: Any, pointer: str) -> Any:
    """What a JSON pointer in a fragment names, True if it cannot be followed here."""
    value = root
    for step in pointer.removeprefix("#").split("/")[1:] if pointer.startswith("#") else ["?"]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(value, dict):
            value = value.get(name, True)
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            return True
    return value


def parse_schema(field: str, text: str) -> Any:
    """Read a schema that was given as JSON text.

    Raises:
        FieldError: names the field.
    """
    if len(text) > MAX_CHARS:
        raise FieldError(field, f"has {len(text)} characters; the limit is {MAX_CHARS}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise FieldError(field, "is not JSON") from None
