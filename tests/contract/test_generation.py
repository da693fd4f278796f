"""Fields that multiply the work of a request are refused by name above their bounds."""

from __future__ import annotations

from typing import Any

import pytest

from ep_serve.contract.errors import FieldError
from ep_serve.contract.generation import _CHECKED, DEFAULT_MAX_N, check_generation

REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "answers": ("n", {"n": 9}),
    "very many answers": ("n", {"n": 10**400}),
    "candidates": ("best_of", {"best_of": 2_000}),
    "biases": ("logit_bias", {"logit_bias": {str(i): 1 for i in range(2_000)}}),
    "stop strings": ("stop", {"stop": ["x"] * 5}),
    "a long stop string": ("stop", {"stop": "x" * 2_000}),
    "a long stop string in a list": ("stop", {"stop": ["x" * 2_000]}),
    "stop tokens": ("stop_token_ids", {"stop_token_ids": [1] * 2_000}),
    "allowed tokens": ("allowed_token_ids", {"allowed_token_ids": [1] * 100_000}),
    "bad words": ("bad_words", {"bad_words": ["x"] * 200}),
    "a long bad word": ("bad_words", {"bad_words": ["x" * 1_000]}),
    "tools": ("tools", {"tools": [{"type": "function"}] * 200}),
    "documents": ("documents", {"documents": [{}] * 2_000}),
    "a constraint that is a list": ("structured_outputs", {"structured_outputs": ["json"]}),
    "a format that is a string": ("response_format", {"response_format": "json"}),
    "a tool that is a string": ("tools[1]", {"tools": [{}, "f"]}),
    "a tool without a name": (
        "tools[0].function",
        {"tools": [{"function": {}}], "tool_choice": {"function": {"name": "f"}}},
    ),
    "prompts": ("prompt", {"prompt": ["x"] * 100, "n": 2}),
    "conversations": ("messages", {"messages": [[{"role": "user", "content": "x"}]] * 200}),
    "messages": ("messages", {"messages": [{"role": "user", "content": "x"}] * 10_000}),
    "messages of a response": ("input", {"input": [{"role": "user"}] * 10_000}),
    "parts of messages": ("messages", {"messages": [{"content": [{}] * 10_000}] * 2}),
    "parts of conversations": ("messages", {"messages": [[{"content": [{}] * 10_000}]] * 2}),
    "tokens to decode": ("tokens", {"tokens": [1] * 1_000_001}),
    "items to score": ("items", {"items": ["x"] * 1_000}),
    "questions": ("questions", {"questions": {str(i): {} for i in range(1_000)}}),
    "repetitions": (
        "repetition_detection.max_pattern_size",
        {"repetition_detection": {"max_pattern_size": 10**6, "min_count": 2}},
    ),
    "a schema": ("structured_outputs.json", {"structured_outputs": {"json": {"$ref": "#"}}}),
}


@pytest.mark.parametrize(("field", "body"), REFUSED.values(), ids=REFUSED.keys())
def test_a_field_above_its_bound_is_refused_by_name(field: str, body: dict[str, Any]) -> None:
    with pytest.raises(FieldError) as caught:
        check_generation(body, DEFAULT_MAX_N)
    assert caught.value.field == field
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"n": 8, "stop": ["a", "b"], "logit_bias": {"5": -100}, "tools": [{"type": "function"}]},
        {"n": None, "stop": None, "bad_words": [], "repetition_detection": None},
        {"prompt": list(range(2_000)), "n": 8},
        {"messages": [{"role": "user", "content": [{"type": "text"}] * 1_000}] * 10, "n": 8},
        {"messages": ["x", None, [], {"content": 5}], "input": "x" * 20_000},
        {"n": "8", "stop": [5], "logit_bias": "x"},  # for the server to refuse
    ],
)
def test_fields_within_their_bounds_are_accepted(body: dict[str, Any]) -> None:
    check_generation(body, DEFAULT_MAX_N)


def test_the_limit_of_answers_is_the_servers() -> None:
    check_generation({"n": 64}, 64)


def test_every_field_that_is_read_makes_a_body_be_checked() -> None:
    class Recorder(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            assert key in _CHECKED
            return super().get(key, default)

    check_generation(Recorder(n=1), 8)
