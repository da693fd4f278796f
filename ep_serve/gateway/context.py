"""Request ids, trace context, the access log and the request metrics, around every request."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders

from ep_serve.gateway import logs
from ep_serve.gateway.errors import internal_error
from ep_serve.gateway.tracing import Tracing

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ep_serve.gateway.gateway import Gateway
    from ep_serve.gateway.tracing import Span

logger = logging.getLogger("ep_serve.gateway.access")

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
)
_QUIET = frozenset({"/health", "/ready"})


class Context:
    """What is known about one request; `scope["state"]["context"]`."""

    __slots__ = ("key_name", "request_id", "span", "started", "trace", "traceparent", "tracing")

    def __init__(self, headers: Headers, tracing: Tracing) -> None:
        self.tracing = tracing
        self.span: Span
        given = headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        trace, state = headers.get("traceparent", ""), headers.get("tracestate", "")
        self.trace: dict[str, str] = {}
        """The trace that the client's request is part of, as headers."""
        if _TRACEPARENT.fullmatch(trace):
            self.trace["traceparent"] = trace
            if state and len(state) <= 512:
                self.trace["tracestate"] = state
        self.traceparent = self.trace.get("traceparent") or _new_trace()
        self.started = time.perf_counter()
        self.key_name = ""

    def upstream_headers(self) -> dict[str, str]:
        """What an engine is told."""
        trace = self.tracing.traceparent or self.traceparent
        return {**self.trace, "x-request-id": self.request_id, "traceparent": trace}


class ContextMiddleware:
    """Gives every request its `Context`; the last resort for errors that nobody foresaw."""

    def __init__(self, app: ASGIApp, parts: Gateway) -> None:
        self._app = app
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        tracing = Tracing() if scope["path"] in _QUIET else self._parts.tracing
        context = Context(headers, tracing)
        scope.setdefault("state", {})["context"] = context
        logs.request_id.set(context.request_id)
        async with tracing.request(context.trace) as context.span:
            context.traceparent = tracing.traceparent or context.traceparent
            await self._serve(scope, receive, send, context)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, context: Context) -> None:
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answered = MutableHeaders(scope=message)
                answered["x-request-id"] = context.request_id
                answered["x-content-type-options"] = "nosniff"
                if self._parts.draining:
                    answered["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("a request failed in an unforeseen way")
            if status:  # the answer has begun: the server cuts the connection
                raise
            await internal_error().response()(scope, receive, send_with_id)
        finally:
            self._finish(scope, context, status)

    def _finish(self, scope: Scope, context: Context, status: int) -> None:
        route = getattr(scope.get("route"), "path", "other")
        seconds = time.perf_counter() - context.started
        # 499: the client went away before it was answered.
        self._parts.metrics.finished(route, status or 499, seconds)
        context.span.set(request_id=context.request_id)
        context.span.answered(scope["method"], route, status or 499)
        if route not in _QUIET:
            logger.info(
                "request",
                extra={
                    "route": route,
                    "method": scope["method"] if route != "other" else None,
                    "status": status or 499,
                    "seconds": round(seconds, 4),
                    "key": context.key_name or None,
                    "trace_id": context.traceparent[3:35],
                },
            )


def of(scope: Scope | Any) -> Context:
    """The context of a request."""
    context: Context = scope["state"]["context"]
    return context


def _new_trace() -> str:
    # Version 00, not sampled: whoever records traces decides.
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00"
