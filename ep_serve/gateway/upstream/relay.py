"""Relay requests to engines and their responses to clients.

Before the first byte of the response a failed request is retried, never on the same engine: up to
`routing.retries` times while engines did not accept it, and once after an engine accepted it and
failed, because the request itself may be the cause. After the first byte a response is either
complete or ends with an error event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette import responses

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.http.body_writer import BodyWriter
from ep_serve.gateway.upstream.circuit import Outcome
from ep_serve.gateway.upstream.connection import BrokenAnswerError, Connection, is_local_error
from ep_serve.gateway.upstream.engine_errors import (
    CLIENT_ERRORS,
    EngineFailedError,
    client_error,
    client_error_status,
    engine_failed,
    interrupted,
    parse_object,
)
from ep_serve.gateway.upstream.json_answer import JsonAnswer
from ep_serve.gateway.upstream.pool import BUSY
from ep_serve.gateway.upstream.quarantine import Quarantine, trial_limit_reached
from ep_serve.gateway.upstream.sse import Events, EventTooLargeError, error_event, first_event_data
from ep_serve.gateway.upstream.stream import (
    EngineError,
    SlowClientError,
    StalledError,
    Stream,
    redact,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import Scope, Send

    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import RoutingSettings
    from ep_serve.gateway.tracing import Tracing
    from ep_serve.gateway.upstream.pool import Upstream, UpstreamPool
    from ep_serve.gateway.upstream.router import Demand, Router

logger = logging.getLogger(__name__)

MAX_BUFFERED = 64 * 2**10
"""Bytes of a response that are buffered; a larger one is relayed as it arrives. Only responses with
log probabilities are that large."""
MAX_REFUSAL = 2**20
"""Bytes of an error response that are read."""
_JSON_HEADERS = [(b"content-type", b"application/json")]
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_BROKEN = frozenset({"broken", "broken_mid_stream"})


@dataclass(slots=True)
class UpstreamRequest:
    """A chat request as it is sent to engines."""

    body: bytes
    """Released when it can no longer be retried."""
    on_body_released: Callable[[], None]
    content: bytes
    """A digest of the content, the same for all clients."""
    stream: bool
    demand: Demand
    headers: Callable[[], dict[str, str]]
    """Returns the request id and the trace context of the current span."""
    tracing: Tracing
    started: float
    """When the request arrived, on `time.perf_counter`."""
    hide_usage: bool
    """Whether the client did not request the usage event."""
    secrets: tuple[bytes, ...]
    """Texts that must not reach the client: the base URL of `MediaServer`."""


@dataclass(slots=True)
class _Response:
    """A response whose first bytes have arrived."""

    status: int
    first: bytes
    """The body, the start of a large one, or the first events of a stream."""
    events: Events | None
    connection: Connection
    is_complete: bool = True
    """Whether `first` is the complete body."""


class Relay:
    """Sends requests to engines and relays their responses."""

    def __init__(
        self, router: Router, upstreams: UpstreamPool, settings: RoutingSettings, metrics: Metrics
    ) -> None:
        self._router = router
        self._upstreams = upstreams
        self._settings = settings
        self._metrics = metrics
        self._quarantine = Quarantine(settings.quarantine_s, metrics)

    async def answer(self, request: UpstreamRequest, scope: Scope, send: Send) -> None:
        """Relay a request and send the response.

        Raises:
            ApiError: the response for the client; nothing was sent yet.
        """
        with self._quarantine.admit(request.content) as on_trial:
            if on_trial and not self._router.has_spare(request.demand):
                raise trial_limit_reached()
            streamed, rest = await self._try_engines(request, scope, send, on_trial)
        # The engine is released before a slow client has read the end.
        if rest is None:
            return
        if streamed:
            await _send(send, rest, last=True)
        else:
            await responses.Response(rest, media_type="application/json")(scope, _no_receive, send)

    async def _try_engines(
        self, request: UpstreamRequest, scope: Scope, send: Send, on_trial: bool
    ) -> tuple[bool, bytes | None]:
        """Try engines until one responds.

        Returns:
            whether the response was streamed, and what is left to send of it: its end, or all.
        """
        excluded: frozenset[str] = frozenset()
        attempts = 1 if on_trial else 2
        while True:
            upstream = await self._router.acquire(request.demand, excluded)
            outcome: Outcome | None = None
            try:
                span = request.tracing.span(
                    "upstream", upstream=upstream.name, attempt=len(excluded)
                )
                async with span, self._response_from(upstream, request) as answer:
                    rest: bytes | None
                    streamed = answer.events is not None or not answer.is_complete
                    if streamed:
                        request.body = b""
                        request.on_body_released()
                    if answer.events is not None:
                        rest, reason = await self._stream(
                            answer, answer.events, request, scope, send
                        )
                    elif streamed:
                        rest, reason = await self._relay_large_body(answer, request, scope, send)
                    else:
                        rest, reason = self._complete(answer, request), ""
                outcome = await self._record_outcome(upstream, request, reason)
                return streamed, rest
            except EngineFailedError as failure:
                outcome = await self._record_outcome(
                    upstream, request, failure.reason, len(excluded)
                )
                excluded |= {upstream.name}
                attempts -= failure.was_accepted
                others = self._router.has_alternative(request.demand, excluded)
                if not others or not attempts or len(excluded) > self._settings.retries:
                    raise failure.error from None
                self._quarantine.check(
                    request.content
                )  # copies of it may have crashed other engines
            finally:
                self._router.release(upstream, request.demand, outcome)

    async def _record_outcome(
        self, upstream: Upstream, request: UpstreamRequest, reason: str, attempt: int = 0
    ) -> Outcome | None:
        """Record the result of a request; `reason` is why it failed, "" if it succeeded."""
        if not reason:
            self._quarantine.answered(request.content)
            return Outcome.SUCCEEDED
        if reason == "slow_client":
            return None
        self._metrics.upstream_failures.labels(reason).inc()
        logger.warning(
            "attempt failed: %s", reason, extra={"upstream": upstream.name, "attempt": attempt}
        )
        if reason in ("busy", "no_socket"):
            return None
        is_dead = self._upstreams.check_liveness(upstream)
        if reason == "unreachable":
            return Outcome.UNRESPONSIVE
        # vLLM answers all requests with an error when its engine core has died, and then exits.
        broke = reason in _BROKEN or await is_dead
        if broke and not upstream.is_retired:  # retired engines are stopped on purpose
            self._quarantine.record_crash(request.content, upstream.record_crash())
        if reason == "timeout":
            silent = upstream.is_silent_for(self._response_timeout(request))
            return Outcome.UNRESPONSIVE if silent else None
        if reason == "stalled_mid_stream":
            silent = upstream.is_silent_for(self._settings.idle_timeout_s)
            return Outcome.UNRESPONSIVE if silent else None
        return Outcome.FAILED

    @asynccontextmanager
    async def _response_from(
        self, upstream: Upstream, request: UpstreamRequest
    ) -> AsyncIterator[_Response]:
        """Send the request to one engine and yield the response."""
        connection: Connection | None = None
        try:
            try:
                async with asyncio.timeout(self._response_timeout(request)):
                    connection = await upstream.connections.acquire()
                    connection.send_request(
                        upstream.chat_head(request.headers(), len(request.body)), request.body
                    )
                    answer = await self._read_response(connection, request)
            except TimeoutError:
                error = ApiError(504, "The engine did not answer in time.", code="upstream_timeout")
                raise EngineFailedError(error, "timeout") from None
            except (OSError, BrokenAnswerError) as failure:
                reason = "unreachable" if connection is None else "broken"
                if connection is None and is_local_error(failure):
                    reason = "no_socket"
                error = ApiError(502, "The engine could not be reached.", code="upstream_error")
                raise EngineFailedError(error, reason) from None
            except (EngineError, EventTooLargeError):
                raise engine_failed("no_events") from None
            yield answer
        finally:
            if connection is not None:
                upstream.connections.release(connection)

    def _response_timeout(self, request: UpstreamRequest) -> float:
        if request.stream:
            return self._settings.first_byte_timeout_s
        return self._settings.answer_timeout_s

    async def _read_response(self, connection: Connection, request: UpstreamRequest) -> _Response:
        await connection.read_head()
        status = connection.status
        if status in BUSY:
            error = ApiError(429, "The engines are busy.", code="overloaded", retry_after=2)
            raise EngineFailedError(error, "busy")
        if status != 200 and status not in CLIENT_ERRORS:
            raise engine_failed(f"status_{status // 100}xx")
        kind = connection.headers.get(b"content-type", b"")
        if status == 200 and kind.lower().startswith(b"text/event-stream"):
            return await self._read_first_events(connection, Events(hide_usage=request.hide_usage))
        body = bytearray()
        held = MAX_BUFFERED if status == 200 else MAX_REFUSAL
        chunk = b""
        while len(body) <= held and (chunk := await connection.read()):
            body += chunk
        return _Response(
            status, bytes(body), None, connection, is_complete=not chunk or status != 200
        )

    async def _read_first_events(self, connection: Connection, events: Events) -> _Response:
        while data := await connection.read():
            if first := events.feed(data):
                end = events.error_at(first)
                if end is None:
                    return _Response(200, first, events, connection)
                if end == 0 and (code := client_error_status(first)):
                    return _Response(code, first_event_data(first), None, connection)
                break
        raise EngineError

    def _complete(self, answer: _Response, request: UpstreamRequest) -> bytes:
        """Return the body of a response that is not streamed."""
        if answer.status != 200:
            raise client_error(answer.status, redact(request.secrets, answer.first))
        body = parse_object(answer.first)
        if body is None:
            raise engine_failed("not_json")
        self._count(body.get("usage"), request)
        return answer.first

    async def _stream(
        self, answer: _Response, events: Events, request: UpstreamRequest, scope: Scope, send: Send
    ) -> tuple[bytes | None, str]:
        """Relay a stream; return its unsent end and the reason of a failure, if any."""
        self._metrics.first_token.observe(time.perf_counter() - request.started)
        start = {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
        await send(start)
        writer: BodyWriter = scope["extensions"][BodyWriter.EXTENSION]
        writer.write(redact(request.secrets, answer.first))
        stream = Stream(events, answer.connection, writer, request.secrets)
        try:
            reason = await self._run(stream)
        except asyncio.CancelledError:
            # The deadline or shutdown; a disconnected client ignores the event.
            late = ApiError(504, "The request ran out of time.", code="deadline_exceeded")
            if not writer.paused:  # a slow client would not read it
                with suppress(Exception):
                    await _send(send, error_event(late), last=True)
            raise
        if reason == "slow_client":
            return None, reason
        if not reason and not events.done:
            reason = "failed_mid_stream"
        if events.last_usage is not None and (chunk := parse_object(events.last_usage)):
            self._count(chunk.get("usage"), request)
        return stream.rest + (error_event(interrupted()) if reason else b""), reason

    async def _relay_large_body(
        self, answer: _Response, request: UpstreamRequest, scope: Scope, send: Send
    ) -> tuple[bytes | None, str]:
        """Relay a large response; return its unsent end and the reason of a failure, if any.

        A failure aborts the connection to the client.
        """
        await send({"type": "http.response.start", "status": 200, "headers": _JSON_HEADERS})
        writer: BodyWriter = scope["extensions"][BodyWriter.EXTENSION]
        body = JsonAnswer()
        writer.write(body.feed(answer.first))
        stream = Stream(body, answer.connection, writer, ())
        try:
            reason = await self._run(stream)
        except asyncio.CancelledError:
            writer.abort()
            raise
        if reason:
            writer.abort()
            await asyncio.sleep(0)  # until the server has processed the abort
            return None, reason
        self._count(body.usage, request)
        return stream.rest, ""

    async def _run(self, stream: Stream) -> str:
        """Relay a stream; return the reason of a failure, or ""."""
        try:
            await stream.run(self._settings.idle_timeout_s)
        except BrokenAnswerError:
            return "broken_mid_stream"
        except StalledError:
            return "stalled_mid_stream"
        except (EngineError, EventTooLargeError):
            return "failed_mid_stream"
        except SlowClientError:
            logger.warning("a client did not read its answer")
            return "slow_client"
        return ""

    def _count(self, usage: Any, request: UpstreamRequest) -> None:
        if isinstance(usage, dict):
            self._metrics.record_usage(usage, time.perf_counter() - request.started)


async def _send(send: Send, data: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": not last})


async def _no_receive() -> Any:
    raise RuntimeError("the body has been read")
