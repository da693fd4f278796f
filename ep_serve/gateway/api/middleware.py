"""Middleware for request ids, trace context, the access log and request metrics."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from ep_serve.gateway import logs
from ep_serve.gateway.context import Context
from ep_serve.gateway.errors import internal_error
from ep_serve.gateway.tracing import Tracing

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from ep_serve.gateway.gateway import Gateway

logger = logging.getLogger("ep_serve.gateway.access")

_QUIET = frozenset({"/health", "/ready"})


class ContextMiddleware:
    """Creates the `Context` of each request and handles unexpected errors."""

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
                if self._parts.is_draining:
                    answered["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unhandled exception in a request")
            if status:  # the response has begun: the server closes the connection
                raise
            await internal_error().response()(scope, receive, send_with_id)
        finally:
            self._finish(scope, context, status)

    def _finish(self, scope: Scope, context: Context, status: int) -> None:
        route = getattr(scope.get("route"), "path", "other")
        seconds = time.perf_counter() - context.started
        # 499: the client disconnected before the response.
        self._parts.metrics.record_request(route, status or 499, seconds)
        context.span.set(request_id=context.request_id)
        context.span.set_response(scope["method"], route, status or 499)
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
