"""Schemas and grammars: ordinary ones pass, those that cost too much are refused by their field."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from ep_serve.contract.errors import FieldError
from ep_serve.contract.json_schemas import MAX_DEPTH, MAX_VALUES
from ep_serve.contract.structured_outputs import check_structured_outputs

TREE = {
    "$ref": "#/$defs/tree",
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 80},
                "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}},
            },
            "required": ["name", "children"],
        }
    },
}
JSON_GRAMMAR = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\] | "\\" (["\\/bfnrt] | "u" [0-9a-f]{4}))* "\"" ws  # any text
number ::= "-"? ([0-9] | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [-+]? [0-9]+)? ws
ws     ::= ([ \t\n] ws)?
"""

ACCEPTED: dict[str, dict[str, Any]] = {
    "a tree": {"json": TREE},
    "a schema as text": {"json": json.dumps(TREE)},
    "a linked list": {
        "json": {"anyOf": [{"type": "null"}, {"type": "array", "prefixItems": [{"$ref": "#"}]}]}
    },
    "a long enumeration": {"json": {"enum": [f"value {i}" for i in range(5_000)]}},
    "bounded strings": {
        "json": {
            "type": "object",
            "properties": {f"p{i}": {"type": "string", "maxLength": 250} for i in range(100)},
        }
    },
    "a required property that nothing describes": {"json": {"required": ["x"]}},
    "a reference elsewhere": {"json": {"$ref": "http://example.org/schema"}},
    "choices": {"choice": ["yes", "no"] * 100},
    "a number": {"regex": r"-?\d{1,3}(,\d{3})*(\.\d+)?"},
    "an address": {"regex": r"(\d{1,3}\.){3}\d{1,3}"},
    "a mail address": {"regex": r"^[\w.+-]+@[\w-]+(\.[\w-]+)+$"},
    "a sentence": {"regex": r"[A-Z][a-z]*( [a-z]+){0,30}[.?!]"},
    "a lazy loop": {"regex": r"<b>.*?</b>"},
    "an unknown escape": {"regex": r"\p{L}+[]a]"},
    "a grammar of JSON": {"grammar": JSON_GRAMMAR},
    "a left-recursive grammar": {"grammar": 'root ::= root "+" term | term\nterm ::= [0-9]+'},
    "a rule behind its use": {"grammar": 'root ::= a\na ::= "x"\nunused ::= unused'},
    "a structural tag": {
        "structural_tag": json.dumps(
            {
                "type": "structural_tag",
                "format": {
                    "type": "triggered_tags",
                    "triggers": ["<f"],
                    "tags": [
                        {
                            "type": "tag",
                            "begin": "<f>",
                            "content": {"type": "json_schema", "json_schema": TREE},
                            "end": "</f>",
                        }
                    ],
                },
            }
        )
    },
    "another type than the field's": {"regex": 5, "choice": "x", "grammar": {}, "json": True},
}

ENDLESS: dict[str, Any] = {
    "itself": {"$ref": "#"},
    "each other": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"anyOf": [{"$ref": "#/$defs/a"}]}},
    },
    "a required property": {
        "type": "object",
        "properties": {"next": {"$ref": "#"}},
        "required": ["next"],
    },
    "a first item": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "an optional property": {
        "properties": {"x": {"$ref": "#/$defs/x"}},
        "$defs": {"x": {"allOf": [{"$ref": "#/$defs/x"}]}},
    },
    "an escaped name": {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"$ref": "#/$defs/a~1b"}}},
}


def chain(count: int) -> str:
    rules = [f'r{i} ::= r{i + 1} r{i + 1} | ""' for i in range(count)]
    return "\n".join(["root ::= r0", *rules, f"r{count} ::= [a-z]*"])


def nested(depth: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


REFUSED: dict[str, tuple[str, Any, str]] = {  # field, value, what the message says
    "items": ("json", {"type": "array", "minItems": 10**9}, "minItems 1000000000"),
    "an endless number": ("json", {"maxItems": 10**400}, "maxItems 1e18 or more"),
    "a length": ("json", {"type": "string", "maxLength": 10**9}, "maxLength"),
    "depth": ("json", nested(MAX_DEPTH + 1), f"deeper than {MAX_DEPTH}"),
    "values": ("json", {"enum": list(range(MAX_VALUES))}, f"exceeds {MAX_VALUES} JSON values"),
    "characters": ("json", {"const": "x" * 300_000}, "characters"),
    "characters of names": ("json", {"properties": {"x" * 300_000: {}}}, "characters"),
    "text that is no JSON": ("json", "{", "is not JSON"),
    "properties": (
        "json",
        {"type": "object", "properties": {f"p{i}": {} for i in range(300)}},
        "more than 256 properties",
    ),
    "many bounded strings": (
        "json",
        {"properties": {f"p{i}": {"type": "string", "maxLength": 200 + i} for i in range(30)}},
        "states",
    ),
    "a pattern": ("json", {"type": "string", "pattern": "([a-z]?){64}"}, "parts"),
    "a pattern of names": ("json", {"patternProperties": {"(a*)*": {}}}, "parts"),
    "a repetition": ("regex", "a{1000000000}", "repeats a part 1000000000 times"),
    "classes": ("regex", "([a-z]{100}-){100}", "states"),
    "optional parts": ("regex", "[a-z]?" * 32, "parts"),
    "bounded parts": ("regex", "[a-z]{0,5}" * 32, "parts"),
    "a repeated optional part": ("regex", "([a-z]?){64}", "parts"),
    "a loop in a loop": ("regex", "(([a-z]*)*)*", "parts"),
    "a counted loop in another": ("regex", "(a{1,99}){1,99}", "parts"),
    "a loop in a counted loop": ("regex", "(a+){1,9999}", "parts"),
    "groups": ("regex", "(" * 100 + "a" + ")" * 100, "nests groups"),
    "an open group": ("regex", "(a", "parenthesis"),
    "a closed group": ("regex", "a)", "parenthesis"),
    "numbers in the wrong order": ("regex", "a{3,2}", "wrong order"),
    "a long pattern": ("regex", "a" * 10_000, "pattern of 10000 characters"),
    "choices": ("choice", ["x"] * 100_000, "has 100000 entries"),
    "long choices": ("choice", ["x" * 1_000] * 100, "has 100000 characters"),
    "a rule that is itself": ("grammar", "root ::= root", "root without a finite expansion"),
    "an endless rule": ("grammar", 'root ::= "a" root', "root without a finite expansion"),
    "endless rules": ("grammar", "root ::= a\na ::= b\nb ::= a", "without a finite expansion"),
    "an endless branch": ("grammar", 'root ::= "b" | "a" x\nx ::= x', "x without a finite"),
    "an empty recursion": ("grammar", 'root ::= root root root | [a-z] | ""', "parts"),
    "a chain that may be empty": ("grammar", chain(8), "parts"),
    "a long chain that may be empty": ("grammar", chain(200), "parts"),
    "a missing rule": ("grammar", "root ::= nope", "nope, which is not defined"),
    "no root": ("grammar", 'a ::= "x"', "no rule root"),
    "another notation": ("grammar", 'start: "x"', "EBNF"),
    "a repetition of nothing": ("grammar", "root ::= *", "without a preceding element"),
    "rules": (
        "grammar",
        "root ::= r0\n" + "\n".join(f'r{i} ::= "a"' for i in range(300)),
        "more than 256 rules",
    ),
    "a long grammar": ("grammar", "root ::= " + '"a" ' * 10_000, "characters"),
}


def refusal(body: dict[str, Any]) -> FieldError:
    began = time.process_time()
    with pytest.raises(FieldError) as caught:
        check_structured_outputs(body)
    assert time.process_time() - began < 2
    assert str(caught.value).startswith(caught.value.field)
    return caught.value


@pytest.mark.parametrize("given", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_ordinary_constraints_are_accepted(given: dict[str, Any]) -> None:
    check_structured_outputs({"structured_outputs": given})


@pytest.mark.parametrize("schema", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_schema_that_no_finite_answer_matches_is_refused(schema: Any) -> None:
    error = refusal({"structured_outputs": {"json": schema}})
    assert error.field == "structured_outputs.json"
    assert "no finite document" in str(error)


@pytest.mark.parametrize(("name", "value", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_costs_too_much_is_refused_by_its_field(name: str, value: Any, words: str) -> None:
    error = refusal({"structured_outputs": {name: value}})
    assert error.field == f"structured_outputs.{name}"
    assert words in str(error)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            "response_format.json_schema.schema",
        ),
        (
            {"tools": [{}, {"type": "function", "function": {"parameters": {"$ref": "#"}}}]},
            "tools[1].function.parameters",
        ),
        (
            {
                "response_format": {
                    "type": "structural_tag",
                    "format": {"type": "grammar", "grammar": "root ::= root"},
                }
            },
            "response_format.grammar",
        ),
        (
            {
                "response_format": {
                    "type": "structural_tag",
                    "structures": [{"begin": "<a>", "schema": {"$ref": "#"}, "end": "</a>"}],
                    "triggers": ["<a>"],
                }
            },
            "response_format.structures[0].schema",
        ),
    ],
)
def test_every_field_that_holds_a_schema_is_checked(body: dict[str, Any], field: str) -> None:
    assert refusal(body).field == field


def test_optional_parts_of_a_structural_tag_are_counted_together() -> None:
    optional = {"type": "optional", "content": {"type": "regex", "pattern": "[a-z]"}}
    tag = {"type": "structural_tag", "format": {"type": "sequence", "elements": [optional] * 20}}
    assert "parts" in str(refusal({"structured_outputs": {"structural_tag": tag}}))


def test_schemas_of_a_request_are_counted_together() -> None:
    tool = {"type": "function", "function": {"parameters": {"enum": list(range(1_000))}}}
    check_structured_outputs({"tools": [tool] * 9})
    assert refusal({"tools": [tool] * 10}).field == "tools[9].function.parameters"


@pytest.mark.parametrize("body", [{}, {"tools": 5}, {"response_format": []}, {"tools": [None]}])
def test_a_request_without_a_constraint_is_accepted(body: dict[str, Any]) -> None:
    check_structured_outputs(body)
