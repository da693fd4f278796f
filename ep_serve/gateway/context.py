"""The context of a request: its id, trace, API key name and start time."""

from __future__ import annotations

import re
import secrets
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.datastructures import Headers
    from starlette.types import Scope

    from ep_serve.gateway.tracing import Span, Tracing

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)


class Context:
    """The context of one request, in `scope["state"]["context"]`."""

    __slots__ = ("key_name", "request_id", "span", "started", "trace", "traceparent", "tracing")

    def __init__(self, headers: Headers, tracing: Tracing) -> None:
        self.tracing = tracing
        self.span: Span
        given = headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        trace, state = headers.get("traceparent", ""), headers.get("tracestate", "")
        self.trace: dict[str, str] = {}
        """The client's trace context, as headers."""
        if _TRACEPARENT.fullmatch(trace):
            self.trace["traceparent"] = trace
            if state and len(state) <= 512:
                self.trace["tracestate"] = state
        self.traceparent = self.trace.get("traceparent") or _new_trace()
        self.started = time.perf_counter()
        self.key_name = ""

    def upstream_headers(self) -> dict[str, str]:
        """Return the request id and trace headers for an engine."""
        trace = self.tracing.traceparent or self.traceparent
        return {**self.trace, "x-request-id": self.request_id, "traceparent": trace}


def get_context(scope: Scope | Any) -> Context:
    """Return the context of a request."""
    context: Context = scope["state"]["context"]
    return context


def _new_trace() -> str:
    # Version 00, not sampled: the services that record traces decide.
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"
