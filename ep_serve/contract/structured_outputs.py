"""Bound the cost of schemas and grammars for structured outputs.

The engine compiles a grammar against the whole vocabulary and computes the allowed tokens in each
step. Within these bounds a compilation takes seconds at worst and a step milliseconds; outside,
either can take minutes. Grammars without a finite match are rejected too: the engine would run out
of allowed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ep_serve.contract.errors import FieldError
from ep_serve.contract.expressions import (
    Alt,
    Atom,
    Empty,
    Expr,
    ExpressionCost,
    Ref,
    Repeat,
    Seq,
    expression_cost,
)
from ep_serve.contract.grammars import grammar_cost
from ep_serve.contract.json_schemas import (
    MAX_DEPTH,
    RequestCosts,
    check_cost,
    check_regex,
    check_schema,
    objects,
    parse_schema,
)

MAX_CHOICES = 4_096
MAX_CHOICE_CHARS = 65_536
"""Total characters of all choices."""
MAX_TAG_DEPTH = MAX_DEPTH + 16
"""Nesting depth of a structural tag, which contains schemas."""


def check_structured_outputs(body: Mapping[str, Any]) -> None:
    """Check `structured_outputs`, `response_format` and `tools` of a request.

    Values of a wrong type are left to the server's own validation.

    Args:
        body: fields of `/v1/chat/completions` or `/v1/completions`.

    Raises:
        FieldError: names the field, the limit and the value.
    """
    costs = RequestCosts()
    check_constraint("structured_outputs", body.get("structured_outputs"), costs)
    response_format = body.get("response_format")
    if isinstance(response_format, Mapping):
        schema = response_format.get("json_schema")
        if isinstance(schema, Mapping):
            field = "response_format.json_schema.schema"
            check_schema(field, schema.get("schema"), costs)
        if response_format.get("type") == "structural_tag":
            _check_tag("response_format", response_format, costs)
    tools = body.get("tools")
    for index, tool in enumerate(tools if isinstance(tools, list) else []):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if isinstance(function, Mapping):
            field = f"tools[{index}].function.parameters"
            check_schema(field, function.get("parameters"), costs)


def check_constraint(field: str, given: Any, costs: RequestCosts) -> None:
    """Check vLLM's `structured_outputs` and add its cost.

    Raises:
        FieldError: names the field below `field`.
    """
    if not isinstance(given, Mapping):
        return
    if (schema := given.get("json")) is not None:
        name = f"{field}.json"
        check_schema(name, parse_schema(name, schema) if isinstance(schema, str) else schema, costs)
    if isinstance(grammar := given.get("grammar"), str):
        check_cost(f"{field}.grammar", grammar_cost(f"{field}.grammar", grammar), costs)
    for name in ("regex", "whitespace_pattern"):
        if isinstance(pattern := given.get(name), str):
            check_regex(f"{field}.{name}", pattern, costs)
    if isinstance(choices := given.get("choice"), list):
        _check_choices(f"{field}.choice", choices)
    if (tag := given.get("structural_tag")) is not None:
        name = f"{field}.structural_tag"
        _check_tag(name, parse_schema(name, tag) if isinstance(tag, str) else tag, costs)


def _check_choices(field: str, choices: list[Any]) -> None:
    if len(choices) > MAX_CHOICES:
        raise FieldError(field, f"has {len(choices)} entries; the limit is {MAX_CHOICES}")
    chars = sum(len(choice) for choice in choices if isinstance(choice, str))
    if chars > MAX_CHOICE_CHARS:
        raise FieldError(field, f"has {chars} characters; the limit is {MAX_CHOICE_CHARS}")


def _check_tag(field: str, tag: Any, costs: RequestCosts) -> None:
    for _ in objects(field, tag, RequestCosts(), MAX_TAG_DEPTH):
        pass
    if not isinstance(tag, Mapping):
        return
    structures = tag.get("structures")
    for index, structure in enumerate(structures if isinstance(structures, list) else []):
        if isinstance(structure, Mapping):
            check_schema(f"{field}.structures[{index}].schema", structure.get("schema"), costs)
    reader = _TagReader(field, costs)
    expr = reader.expr(tag.get("format"))
    check_cost(field, expression_cost(expr, reader.costs_by_rule.__getitem__), costs)


class _TagReader:
    """Converts a structural tag of xgrammar 0.2.8 to an expression and checks nested schemas."""

    def __init__(self, field: str, costs: RequestCosts) -> None:
        self._field = field
        self._costs = costs
        self.costs_by_rule: dict[str, ExpressionCost] = {}

    def expr(self, tag: Any) -> Expr:
        if not isinstance(tag, Mapping):
            return Empty()
        kind = tag.get("type")
        if kind in ("json_schema", "qwen_xml_parameter"):
            check_schema(f"{self._field}.json_schema", tag.get("json_schema"), self._costs)
            return Atom(0)
        if kind == "regex" and isinstance(pattern := tag.get("pattern"), str):
            return self._known(check_regex(f"{self._field}.pattern", pattern, self._costs))
        if kind == "grammar" and isinstance(text := tag.get("grammar"), str):
            return self._known(grammar_cost(f"{self._field}.grammar", text))
        inner = [self.expr(item) for item in _children(tag)]
        match kind:
            case "or":
                return Alt(tuple(inner)) if inner else Empty()
            case "sequence":
                return Seq(tuple(inner))
            case "tag":
                return Seq((Atom(0), *inner, Atom(0)))
            case "optional":
                return Repeat(Seq(tuple(inner)), 0, 1)
            case "plus":
                return Repeat(Seq(tuple(inner)), 1, None)
            case "star" | "repeat":
                return Repeat(Seq(tuple(inner)), 0, None)
            case "const_string":
                return Atom(0) if tag.get("value") else Empty()
            case _:  # free text with embedded tags
                return Repeat(Alt((Atom(1), *inner)), 0, None)

    def _known(self, found: ExpressionCost) -> Ref:
        name = str(len(self.costs_by_rule))
        self.costs_by_rule[name] = found
        return Ref(name)


def _children(tag: Mapping[str, Any]) -> list[Any]:
    """Return the nested formats of a format."""
    found = [tag["content"]] if "content" in tag else []
    for name in ("elements", "tags"):
        items = tag.get(name)
        found += items if isinstance(items, list) else []
    rules = tag.get("rules")
    for rule in rules if isinstance(rules, list) else []:
        found += rule[1:] if isinstance(rule, list) else []
    return found
