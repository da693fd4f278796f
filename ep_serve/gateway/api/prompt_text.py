"""Reject text that would become media tokens in the prompt.

A client that writes `<|VIDEO|>` would make the engine expect a video that does not exist. Chat
templates concatenate strings, so a token can be split over several. The engine checks the rendered
prompt; this check fails earlier and names the field.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ep_serve.contract.media_tokens import find_split_media_token
from ep_serve.gateway.body.json_body import MAX_VALUES, JsonBody
from ep_serve.gateway.body.json_values import Leaves, find_leaf
from ep_serve.gateway.errors import ApiError, invalid

if TYPE_CHECKING:
    from collections.abc import Iterator

NOT_IN_PROMPT = frozenset({"stop", "bad_words"})
"""Fields that are compared with the output and never reach the prompt."""

MARKS = (b"|", b"\\u", b'"arguments"')
"""Every body that `refuse_media_tokens` can reject contains one of these."""

_BEFORE_CONTENT = ("name", "reasoning", "reasoning_content")
_STRIPPED_LINE = "x-anthropic-billing-header"
"""vLLM drops the first line of a system text with this prefix."""


def refuse_media_tokens(body: dict[str, Any], leaves: Leaves) -> None:
    """Reject a body whose strings contain a media token, alone or concatenated by a template.

    Args:
        body: a body with validated messages.
        leaves: leaves of the body without `NOT_IN_PROMPT`.

    Raises:
        ApiError: 400 with the path of the text, or for too large tool call arguments.
    """
    contents: list[str] = []
    messages: list[str] = []
    decoded = Leaves()
    budget = MAX_VALUES
    for number, message in enumerate(body["messages"]):
        content = list(_contents(message))
        contents += content
        messages += [text for name in _BEFORE_CONTENT if isinstance(text := message.get(name), str)]
        messages += content
        for name, arguments in _calls(message):
            found = Leaves()
            budget -= _decode(arguments, found, budget, f"messages[{number}].tool_calls")
            messages += [name, *found.strings]
            decoded.strings += found.strings
            decoded.keys += found.keys
    joins = (leaves.strings, leaves.keys, contents, messages, decoded.strings, decoded.keys)
    token = next(filter(None, map(find_split_media_token, joins)), None)
    if token is not None:
        fields = {name: value for name, value in body.items() if name not in NOT_IN_PROMPT}
        place = find_leaf(fields, lambda leaf: isinstance(leaf, str) and token in leaf)
        place = place or "messages"
        raise ApiError(
            400,
            f"{place} contains {token}, a reserved token that marks media in the prompt.",
            code="media_token",
            param=place,
        )


def _contents(message: dict[str, Any]) -> Iterator[str]:
    content = message.get("content")
    for part in content if isinstance(content, list) else [content]:
        text = part.get(part["type"]) if isinstance(part, dict) else part
        if isinstance(text, str):
            stripped = text.startswith(_STRIPPED_LINE)
            yield text.partition("\n")[2] if stripped else text
    if isinstance(refusal := message.get("refusal"), str):
        yield refusal


def _calls(message: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield names and JSON arguments of well-formed tool calls."""
    calls = message.get("tool_calls")
    calls = calls if isinstance(calls, list) else []
    functions = [call.get("function") for call in calls if isinstance(call, dict)]
    for function in [*functions, message.get("function_call")]:
        if isinstance(function, dict):
            name, arguments = function.get("name"), function.get("arguments")
            name = name if isinstance(name, str) else ""
            yield name, arguments if isinstance(arguments, str) else ""


def _decode(arguments: str, found: Leaves, max_values: int, place: str) -> int:
    """Add the decoded arguments that vLLM passes to the template; return their number of values."""
    data = arguments.encode()
    text = JsonBody(len(data), max_values=max_values, media_keys=())
    try:
        text.feed(data)
    except ApiError as error:
        if error.code != "invalid_json":
            raise invalid(f"{place}: {error.message}", place, code=error.code) from None
        return text.values
    with suppress(ValueError):  # vLLM uses an empty object instead
        found.add(json.loads(arguments))
    return text.values
