"""Fields of a request that multiply what one answer costs, and their bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ep_serve.contract.errors import FieldError
from ep_serve.contract.structured_outputs import check_structured_outputs

DEFAULT_MAX_N = 8
"""Most answers to one request, where the server does not set another limit."""

MAX_ENTRIES = {
    "allowed_token_ids": 16_384,
    "bad_words": 128,
    "documents": 1_024,
    "logit_bias": 1_024,
    "logprob_token_ids": 128,
    "stop": 4,
    "stop_token_ids": 1_024,
    "tools": 128,
}
"""Most entries of a list or an object."""
MAX_CHARS = {"bad_words": 256, "stop": 1_024}
"""Most characters of each string in a list, or of the string."""
MAX_PATTERN_SIZE = 64
"""Most tokens of a pattern that `repetition_detection` looks for after each token."""


def check_generation(body: Mapping[str, Any], max_n: int) -> None:
    """Check what scales the work of a generation, whatever bounds the prompt.

    Values of another type than the field's are left to the server that reads them.

    Args:
        body: fields of `/v1/chat/completions`, `/v1/completions` or their sampling parameters.
        max_n: the server's limit of `n`.

    Raises:
        FieldError: names the field, the limit and the value.
    """
    for name in ("n", "best_of"):
        _at_most(name, body.get(name), max_n)
    for name, limit in MAX_ENTRIES.items():
        value = body.get(name)
        if isinstance(value, list | dict):
            _at_most(name, len(value), limit, "entries")
    for name, limit in MAX_CHARS.items():
        value = body.get(name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                _at_most(name, len(text), limit, "characters")
    detection = body.get("repetition_detection")
    if isinstance(detection, Mapping):
        name = "max_pattern_size"
        _at_most(f"repetition_detection.{name}", detection.get(name), MAX_PATTERN_SIZE)
    check_structured_outputs(body)


def _at_most(name: str, value: Any, limit: int, unit: str = "") -> None:
    if not isinstance(value, int | float) or value <= limit:
        return
    shown = value if value < 10**18 else "1e18 or more"
    if unit:
        raise FieldError(name, f"has {shown} {unit}; the limit is {limit}")
    raise FieldError(name, f"must be at most {limit} (got {shown})")
