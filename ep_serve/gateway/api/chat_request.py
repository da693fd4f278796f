"""Validate the body of `/v1/chat/completions` and encode it for the engine.

Unknown fields pass through. Fields of the engine that affect more than one request (caches of other
tenants, transfers between engines, the scheduler) are rejected.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pydantic_core
from pydantic import ValidationError

from ep_serve.contract.errors import FieldError
from ep_serve.contract.generation import check_generation
from ep_serve.contract.request_options import RequestOptions, describe_option_error
from ep_serve.gateway.api.prompt_text import MARKS, NOT_IN_PROMPT, refuse_media_tokens
from ep_serve.gateway.body.json_values import Leaves, check_numbers
from ep_serve.gateway.errors import invalid
from ep_serve.gateway.media.inlined import MIN_MEDIA_BYTES
from ep_serve.gateway.media.parts import MediaPart, media_parts

if TYPE_CHECKING:
    from ep_serve.gateway.body.json_body import JsonBody
    from ep_serve.gateway.keys import Key
    from ep_serve.gateway.settings import RequestSettings

CLOSED_FIELDS = frozenset(
    {
        "cache_salt",
        "chat_template",
        "ec_transfer_params",
        "kv_transfer_params",
        "media_io_kwargs",
        "mm_payload",
        "mm_processor_kwargs",
        "priority",
        "request_id",
        "return_mm_kwargs",
        "session_id",
        "vllm_xargs",
    }
)
"""Fields of vLLM's server that clients of a shared gateway must not set."""

_MAX_NAME = 256


class ChatRequest:
    """A validated body. `parts` refer to it, so that media can be rewritten in place.

    Raises:
        ApiError: 400 for an invalid field, 403 for what the key does not allow.
    """

    def __init__(self, received: JsonBody, key: Key, settings: RequestSettings) -> None:
        marked = received.has_any(MARKS)
        body = self._body = received.parse()
        leaves = _checked_leaves(body)
        self.model = _model(body)
        self.stream = _flag(body, "stream")
        closed = sorted(CLOSED_FIELDS & body.keys())
        if closed:
            raise invalid(f"{closed[0]} must not be set by clients of this server.", closed[0])
        try:
            check_generation(body, settings.max_n)
        except FieldError as error:
            raise invalid(str(error), error.field) from None
        self.hide_usage = self.stream and _request_usage(body)
        own = _request_options(body)
        key.check_model(self.model)
        key.check_keep_ratio(own.keep_ratio, "keep_ratio")
        for name, rho in (("rho_audio", own.rho_audio), ("rho_video", own.rho_video)):
            key.check_keep_ratio(None if rho is None else 1 - rho, name)
        messages = _messages(body, settings.max_messages)
        self.parts: list[MediaPart] = list(
            media_parts(messages, settings.max_parts, received.media)
        )
        if received.media:
            raise invalid(
                f"A string of more than {MIN_MEDIA_BYTES} bytes named 'url', 'data' or "
                "'file_data' must belong to a content part.",
                code="misplaced_media",
            )
        if marked:
            refuse_media_tokens(body, leaves)

    def content(self, digests: dict[str, str]) -> bytes:
        """Return a digest of the content, the same for all clients.

        Args:
            digests: digests of the media by their URLs in the body.
        """
        originals = [(part.part, dict(part.part)) for part in self.parts]
        for part, value in originals:  # URLs and ids differ between requests
            medium = value[value["type"]]
            part[value["type"]] = {**medium, "url": digests[medium["url"]]}
            del part["uuid"]
        text = pydantic_core.to_json(self._body)
        for part, value in originals:
            part.update(value)
        return hashlib.blake2b(text, digest_size=16).digest()

    def encoded(self, priority: int | None, cache_salt: str | None) -> bytes:
        """Encode the body for the engine.

        Args:
            priority: for the engine's scheduler (lower comes first), or None.
            cache_salt: separates the prefix caches of tenants, or None.
        """
        if priority is not None:
            self._body["priority"] = priority
        if cache_salt is not None:
            self._body["cache_salt"] = cache_salt
        return pydantic_core.to_json(self._body)

    def clear(self) -> None:
        """Release the body after it was encoded."""
        self.parts.clear()
        self._body.clear()


def _checked_leaves(body: dict[str, Any]) -> Leaves:
    """Check the numbers of all fields; return the leaves of those that can reach the prompt."""
    leaves, others = Leaves(), Leaves()
    for name, value in body.items():
        (others if name in NOT_IN_PROMPT else leaves).add({name: value})
    check_numbers(body, leaves)
    check_numbers(body, others)
    return leaves


def _model(body: dict[str, Any]) -> str:
    model = body.get("model")
    if not isinstance(model, str) or not 0 < len(model) <= _MAX_NAME:
        raise invalid(f"model must be a name of up to {_MAX_NAME} characters.", "model")
    return model


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(f"{name} must be true or false.", name)
    return bool(value)


def _request_usage(body: dict[str, Any]) -> bool:
    """Request the usage of a stream; False if the client does, or with several choices.

    With several choices it would move vLLM's fingerprint to other events.
    """
    options = body.get("stream_options")
    if options is None:
        options = {}
    if (
        not isinstance(options, dict)
        or options.get("include_usage")
        or body.get("n") not in (None, 1)
    ):
        return False
    if "continuous_usage_stats" in options:  # they require include_usage
        options = {**options, "continuous_usage_stats": False}
    body["stream_options"] = {**options, "include_usage": True}
    return True


def _request_options(body: dict[str, Any]) -> RequestOptions:
    try:
        return RequestOptions.model_validate(body)
    except ValidationError as error:
        name, sentence = describe_option_error(error)
        raise invalid(sentence, name) from None


def _messages(body: dict[str, Any], limit: int) -> list[Any]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise invalid("messages must be a list with at least one message.", "messages")
    if len(messages) > limit:
        raise invalid(f"messages has {len(messages)} entries; the limit is {limit}.", "messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            where = f"messages[{number}]"
            raise invalid(f"{where} must be an object with a string 'role'.", where)
    return messages
