from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ep_serve.contract.request_options import (
    RequestOptions,
    describe_option_error,
    json_schema,
)


def refusal(**fields: Any) -> tuple[str, str]:
    with pytest.raises(ValidationError) as error:
        RequestOptions.model_validate(fields)
    return describe_option_error(error.value)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (
            "min_pixels",
            1_000_000_000,
            "min_pixels must be an integer, at least 784 and at most 12845056 (got 1000000000).",
        ),
        ("max_pixels", 1.5, "must be an integer, at least 784 and at most 12845056 (got 1.5)."),
        ("keep_ratio", 0, "must be a number, greater than 0 and at most 1 (got 0)."),
        ("keep_ratio", float("nan"), "greater than 0 and at most 1 (got nan)."),
        ("keep_ratio", True, "greater than 0 and at most 1 (got True)."),
        ("keep_ratio", [0.2], "greater than 0 and at most 1."),
        ("rho_video", 1.1, "must be a number, at least 0 and at most 1 (got 1.1)."),
        ("fps", 1000, "must be a number, at least 0.001 and at most 60.0 (got 1000)."),
        ("fps", float("inf"), "at most 60.0 (got inf)."),
        ("use_audio_in_video", 1, "must be true or false (got 1)."),
    ],
)
def test_a_refusal_names_field_bounds_and_value(field: str, value: object, sentence: str) -> None:
    name, said = refusal(**{field: value})
    assert name == field
    assert said.startswith(f"{field} must be ")
    assert said.endswith(sentence)


def test_min_pixels_above_max_pixels_is_refused() -> None:
    assert refusal(min_pixels=2000, max_pixels=1000) == (
        "min_pixels",
        "min_pixels must be at most max_pixels, 1000 (got 2000).",
    )


def test_an_integer_too_long_to_print_is_refused() -> None:
    assert refusal(min_pixels=10**5000)[1].endswith("at most 12845056.")


def test_every_number_is_bounded_at_both_ends() -> None:
    for name, schema in json_schema().items():
        kind = schema["anyOf"][0]
        if kind["type"] != "boolean":
            assert "maximum" in kind, name
            assert {"minimum", "exclusiveMinimum"} & kind.keys(), name


def test_null_and_unknown_fields_are_accepted() -> None:
    options = RequestOptions.model_validate(dict.fromkeys(json_schema()) | {"temperature": 0})
    assert options == RequestOptions()
