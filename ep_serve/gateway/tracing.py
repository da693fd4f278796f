"""OpenTelemetry tracing, which is optional.

Each request is a span with child spans for fetching, probing, queueing and the request to the
engine. Attributes hold only counts, codes and internal names, never client data, keys, URLs or
error messages.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from ep_serve.gateway.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from ep_serve.gateway.settings import TracingSettings

NAMESPACE = "ep_serve."
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_EXPORT_S = 5
_CLOSE_S = 10.0


class Span:
    """A span that is not recorded."""

    def set(self, **values: str | int | float) -> None:
        """Set attributes, in the namespace `ep_serve`."""

    def set_response(self, method: str, route: str, status: int) -> None:
        """Set method, route and status of a request's span."""

    async def __aenter__(self) -> Span:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


_NOOP_SPAN = Span()


class Tracing:
    """Tracing that records nothing."""

    def request(self, trace: dict[str, str]) -> AbstractAsyncContextManager[Span]:
        """Start the span of a request with the W3C trace context headers `trace`."""
        return _NOOP_SPAN

    def span(self, name: str, **values: str | int | float) -> AbstractAsyncContextManager[Span]:
        """Start a child of the current span; an exception sets its status to error."""
        return _NOOP_SPAN

    @property
    def traceparent(self) -> str:
        """The `traceparent` header of the current span, or ""."""
        return ""

    async def close(self) -> None:
        """Export the recorded spans."""


def create_tracing(settings: TracingSettings) -> Tracing:
    """Create the tracing that the settings select.

    Raises:
        SettingsError: the packages of OpenTelemetry are not installed.
    """
    if not settings.enabled:
        return Tracing()
    try:
        return OtlpTracing(settings)
    except ImportError:
        raise SettingsError(
            "tracing.enabled: OpenTelemetry is not installed; pip install 'ep-serve[tracing]'"
        ) from None


class OtlpTracing(Tracing):
    """Records spans and exports them by OTLP over HTTP in a background thread."""

    def __init__(self, settings: TracingSettings) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Without an endpoint the exporter reads OTEL_EXPORTER_OTLP_* itself.
        given = settings.endpoint
        endpoint = f"{str(given).rstrip('/')}/v1/traces" if given else None
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_S)
        self._provider = TracerProvider(
            sampler=ParentBasedTraceIdRatio(settings.sample_ratio),
            resource=Resource.create({"service.name": settings.service_name}),
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("ep_serve.gateway")
        self._api = trace
        self._w3c = TraceContextTextMapPropagator()

    def request(self, trace: dict[str, str]) -> AbstractAsyncContextManager[Span]:
        server = self._api.SpanKind.SERVER
        return self._started("request", context=self._w3c.extract(trace), kind=server)

    def span(self, name: str, **values: str | int | float) -> AbstractAsyncContextManager[Span]:
        kind = self._api.SpanKind.CLIENT if name == "upstream" else self._api.SpanKind.INTERNAL
        return self._started(name, kind=kind, attributes=_namespaced(values))

    @property
    def traceparent(self) -> str:
        carrier: dict[str, str] = {}
        self._w3c.inject(carrier)
        return carrier.get("traceparent", "")

    async def close(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await asyncio.to_thread(self._provider.shutdown)

    @asynccontextmanager
    async def _started(self, name: str, **options: Any) -> AsyncIterator[Span]:
        # By default exception messages are recorded, which may contain client data.
        options |= {"record_exception": False, "set_status_on_exception": False}
        with self._tracer.start_as_current_span(name, **options) as span:
            recorded = _OtlpSpan(span, self._api.StatusCode.ERROR)
            try:
                yield recorded
            except BaseException as error:
                recorded.set_error(type(error).__name__)
                raise


class _OtlpSpan(Span):
    def __init__(self, span: Any, failed: Any) -> None:
        self._span = span
        self._failed = failed

    def set(self, **values: str | int | float) -> None:
        self._span.set_attributes(_namespaced(values))

    def set_response(self, method: str, route: str, status: int) -> None:
        method = method if method in _METHODS else "_OTHER"
        self._span.update_name(f"{method} {route}")
        self._span.set_attributes(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
            }
        )
        if status >= 500:
            self.set_error(str(status))

    def set_error(self, kind: str) -> None:
        self._span.set_attribute("error.type", kind)
        self._span.set_status(self._failed)


def _namespaced(values: dict[str, str | int | float]) -> dict[str, str | int | float]:
    return {NAMESPACE + name: value for name, value in values.items()}
