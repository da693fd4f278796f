"""Check the size and complexity of JSON schemas for structured outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ep_serve.contract.and_or_graph import AndOrGraph
from ep_serve.contract.errors import FieldError
from ep_serve.contract.expressions import (
    COMPRESSED,
    MAX_ADJACENT,
    MAX_REPEAT,
    MAX_STATES,
    ExpressionCost,
    expression_cost,
    parse_regex,
)

MAX_DEPTH = 64
"""Nesting depth of objects and arrays."""
MAX_VALUES = 10_000
"""JSON values over all schemas of a request."""
MAX_CHARS = 262_144
"""Characters of all names and strings in these schemas."""
MAX_PROPERTIES = 256
"""Properties of one object; the cost of optional ones is quadratic."""
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
class RequestCosts:
    """The total cost of the constraints of one request."""

    values: int = 0
    chars: int = 0
    states: int = 0

    def add(self, field: str, *, values: int = 0, chars: int = 0, states: int = 0) -> None:
        """Add JSON values, their characters and automaton states.

        Raises:
            FieldError: for the limit that is exceeded.
        """
        self.values += values
        self.chars += chars
        self.states += states
        if self.values > MAX_VALUES:
            raise FieldError(
                field, f"exceeds {MAX_VALUES} JSON values over all schemas of the request"
            )
        if self.chars > MAX_CHARS:
            raise FieldError(
                field, f"exceeds {MAX_CHARS} characters over all schemas of the request"
            )
        if self.states > MAX_STATES:
            raise FieldError(
                field,
                f"needs {self.states} automaton states over all constraints (characters of bounded "
                f"strings and classes of unrolled patterns); the limit is {MAX_STATES}",
            )


def check_schema(field: str, schema: Any, costs: RequestCosts) -> None:
    """Check a JSON schema and add its cost.

    Raises:
        FieldError: for its size, nesting, numbers, patterns, or infinite recursion.
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
    costs.add(field, states=sum(min(high or low, COMPRESSED) for low, high in lengths))
    _check_finite(field, schema)


def check_regex(field: str, pattern: str, costs: RequestCosts) -> ExpressionCost:
    """Check a regular expression, add its cost and return it.

    Raises:
        FieldError: for its length, nesting, repetitions or adjacent optional parts.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        raise FieldError(
            field,
            f"has a pattern of {len(pattern)} characters; the limit is {MAX_PATTERN_CHARS}",
        )
    rules: dict[str, ExpressionCost] = {}  # a regular expression refers to none
    found = expression_cost(parse_regex(field, pattern), rules.__getitem__)
    check_cost(field, found, costs)
    return found


def check_cost(field: str, found: ExpressionCost, costs: RequestCosts) -> None:
    """Check the cost of an expression and add it.

    Raises:
        FieldError: for too many adjacent optional parts or automaton states.
    """
    if found.adjacent > MAX_ADJACENT:
        raise FieldError(
            field,
            f"has more than {MAX_ADJACENT} adjacent parts that may be empty or repeat, without "
            "literal text between them",
        )
    costs.add(field, states=found.states)


def objects(
    field: str, value: Any, costs: RequestCosts, depth: int = MAX_DEPTH
) -> Iterator[dict[str, Any]]:
    """Yield the objects in a JSON value, outer ones first, and count its values.

    Raises:
        FieldError: for too many values or too deep nesting.
    """
    level = [value]
    for _ in range(depth + 1):
        chars = sum(len(item) for item in level if isinstance(item, str))
        costs.add(field, values=len(level), chars=chars)
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                costs.add(field, chars=sum(map(len, item)))
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


def _check_finite(field: str, schema: Any) -> None:
    """Reject a schema whose reachable `$ref`s no finite document matches."""
    graph = _SchemaGraph(schema)
    satisfied = graph.graph.solve()
    endless = next((where for where, node in graph.places.items() if node not in satisfied), None)
    if endless is not None:
        raise FieldError(field, f"has a $ref to {endless} that no finite document matches")


class _SchemaGraph:
    """An AND-OR graph of the schemas reachable from the root; only a `$ref` can make a cycle."""

    def __init__(self, root: Any) -> None:
        self.graph = AndOrGraph()
        self.places: dict[str, int] = {}
        """Nodes of `$ref` targets by JSON pointer."""
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
        """Add a node that is satisfied if a finite document can match the schema."""
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
    """Resolve a JSON pointer; the schema True if it cannot be resolved."""
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
    """Parse a schema that is given as JSON text.

    Raises:
        FieldError: for invalid JSON or too much text.
    """
    if len(text) > MAX_CHARS:
        raise FieldError(field, f"has {len(text)} characters; the limit is {MAX_CHARS}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise FieldError(field, "is not JSON") from None
