"""Bounds of request fields that scale the cost of a generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ep_serve.contract.errors import FieldError
from ep_serve.contract.structured_outputs import check_structured_outputs

DEFAULT_MAX_N = 8
"""Default limit of `n`."""

MAX_ENTRIES = {
    "allowed_token_ids": 16_384,
    "bad_words": 128,
    "documents": 1_024,
    "input": 8_192,
    "items": 64,
    "label_token_ids": 1_024,
    "logit_bias": 1_024,
    "logprob_token_ids": 128,
    "messages": 8_192,
    "questions": 64,
    "stop": 4,
    "stop_token_ids": 1_024,
    "tokens": 1_000_000,
    "tools": 128,
}
"""Maximum number of entries of lists and objects."""
MAX_SEQUENCES = 128
"""Maximum number of sequences over all prompts or conversations of a request."""
MAX_CHARS = {"bad_words": 256, "stop": 1_024}
"""Maximum number of characters of a string, or of each string in a list."""
MAX_PARTS = 16_384
"""Maximum number of content parts over all messages."""
MAX_PATTERN_SIZE = 64
"""Maximum pattern length of `repetition_detection`, in tokens."""
_CHECKED = frozenset(
    {
        *("n", "best_of", "prompt", "repetition_detection"),
        *("structured_outputs", "response_format", "tool_choice", "tools"),
        *MAX_ENTRIES,
        *MAX_CHARS,
    }
)


def check_generation(body: Mapping[str, Any], max_n: int) -> None:
    """Check the fields that scale the cost of a generation beyond the prompt.

    Values of a wrong type are left to the server's own validation, except where vLLM 0.32 accesses
    them before it validates.

    Args:
        body: fields of `/v1/chat/completions`, `/v1/completions` or their sampling parameters.
        max_n: the server's limit of `n`.

    Raises:
        FieldError: names the field, the limit and the value.
    """
    if _CHECKED.isdisjoint(body):
        return
    _check_objects(body)
    for name in ("n", "best_of"):
        _check_at_most(name, body.get(name), max_n)
    _check_prompts("prompt", body)
    _check_prompts("messages", body)
    for name in ("messages", "input"):
        _check_at_most(name, _count_parts(body.get(name)), MAX_PARTS, "content parts")
    for name, limit in MAX_ENTRIES.items():
        value = body.get(name)
        if isinstance(value, list | dict):
            _check_at_most(name, len(value), limit, "entries")
    for name, limit in MAX_CHARS.items():
        value = body.get(name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                _check_at_most(name, len(text), limit, "characters")
    detection = body.get("repetition_detection")
    if isinstance(detection, Mapping):
        name = "max_pattern_size"
        _check_at_most(f"repetition_detection.{name}", detection.get(name), MAX_PATTERN_SIZE)
    check_structured_outputs(body)


def _check_objects(body: Mapping[str, Any]) -> None:
    for name in ("structured_outputs", "response_format"):
        if not isinstance(body.get(name), dict | None):
            raise FieldError(name, "must be an object")
    choice, tools = body.get("tool_choice"), body.get("tools")
    named = isinstance(choice, dict) and "function" in choice
    for index, tool in enumerate(tools if isinstance(tools, list) else []):
        if not isinstance(tool, dict):
            raise FieldError(f"tools[{index}]", "must be an object")
        function = tool.get("function")
        if named and not (isinstance(function, dict) and "name" in function):
            raise FieldError(f"tools[{index}].function", "must be an object with a name")


def _check_prompts(name: str, body: Mapping[str, Any]) -> None:
    prompts, n = body.get(name), body.get("n")
    # A list of numbers is one prompt, a list of objects one conversation.
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int | dict):
        answers = len(prompts) * (n if isinstance(n, int) and n > 1 else 1)
        if answers > MAX_SEQUENCES:
            raise FieldError(
                name,
                f"requests {answers} sequences, n for each prompt; the limit is {MAX_SEQUENCES}",
            )


def _count_parts(messages: Any) -> int:
    """Count the content parts of messages, or of a list of conversations."""
    parts = 0
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        parts += len(content) if isinstance(content, list) else _count_parts(message)
    return parts


def _check_at_most(name: str, value: Any, limit: int, unit: str = "") -> None:
    if not isinstance(value, int | float) or value <= limit:
        return
    shown = value if value < 10**18 else "1e18 or more"
    if unit:
        raise FieldError(name, f"has {shown} {unit}; the limit is {limit}")
    raise FieldError(name, f"must be at most {limit} (got {shown})")
