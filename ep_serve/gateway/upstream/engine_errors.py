"""Errors of engines, and the API errors that clients get for them."""

from __future__ import annotations

from typing import Any

import pydantic_core

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.upstream.sse import first_event_data

CLIENT_ERRORS = frozenset({400, 404, 413, 422})
"""Statuses of an engine that blame the request; they reach the client."""


class EngineFailedError(Exception):
    """An engine failed before the first byte of its response.

    Attributes:
        error: what the client gets if no other engine succeeds.
        reason: label of the metric `upstream_failures`.
    """

    def __init__(self, error: ApiError, reason: str) -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason

    @property
    def was_accepted(self) -> bool:
        """Whether the engine had received the request."""
        return self.reason not in ("busy", "unreachable", "no_socket")


def client_error(status: int, body: bytes) -> ApiError:
    """Convert an engine's error response that blames the request."""
    parsed = parse_object(body) or {}
    error = parsed.get("error")
    error = error if isinstance(error, dict) else parsed
    message, param = error.get("message"), error.get("param")
    return ApiError(
        status,
        message if isinstance(message, str) else "The engine refused the request.",
        code="model_not_found" if status == 404 else "refused_by_engine",
        param=param if isinstance(param, str) else None,
    )


def client_error_status(events: bytes) -> int | None:
    """Return the client error status of a stream that has nothing but an error event, or None.

    vLLM detects some invalid requests only after it has started a stream.
    """
    body = parse_object(first_event_data(events)) or {}
    error = body.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and code in CLIENT_ERRORS else None


def parse_object(data: bytes) -> dict[str, Any] | None:
    """Parse a JSON object; None for anything else."""
    try:
        body = pydantic_core.from_json(data)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def engine_failed(reason: str) -> EngineFailedError:
    """502 without details, for the metric's label `reason`."""
    return EngineFailedError(ApiError(502, "The engine failed.", code="upstream_error"), reason)


def interrupted() -> ApiError:
    """502 for a stream that ended early."""
    return ApiError(
        502,
        "The engine closed the connection in the middle of the response.",
        code="upstream_error",
    )
