"""Sending a request to an engine and its answer to the client.

As long as the client has seen nothing, another engine may be tried, never the same one again: up to
`routing.retries` while engines did not take the request, and a single one after an engine took it
and failed, because the request itself may be the cause. From the first byte on the answer is either
complete or ends with an error event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pydantic_core
from starlette.responses import Response

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.http.body_writer import BodyWriter
from ep_serve.gateway.upstream.circuit import Outcome
from ep_serve.gateway.upstream.connection import BrokenAnswerError, Connection, is_local
from ep_serve.gateway.upstream.json_answer import JsonAnswer
from ep_serve.gateway.upstream.pool import BUSY
from ep_serve.gateway.upstream.quarantine import Quarantine, not_now
from ep_serve.gateway.upstream.sse import Events, EventTooLargeError, error_event, first_data
from ep_serve.gateway.upstream.stream import (
    EngineError,
    SlowClientError,
    StalledError,
    Stream,
    without,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import Scope, Send

    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.settings import RoutingSettings
    from ep_serve.gateway.tracing import Tracing
    from ep_serve.gateway.upstream.pool import Upstream, Upstreams
    from ep_serve.gateway.upstream.router import Demand, Router

logger = logging.getLogger(__name__)

MAX_HELD = 64 * 2**10
"""Bytes of an answer that are held; a larger one is passed on as it arrives. Text is smaller, but
log probabilities are not."""
MAX_REFUSAL = 2**20
"""Bytes of an engine's refusal that are read."""
_JSON_HEADERS = [(b"content-type", b"application/json")]
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_PASSED_ON = frozenset({400, 404, 413, 422})
_BROKEN = frozenset({"broken", "broken_mid_stream"})


@dataclass(slots=True)
class Job:
    """One request, ready to be sent."""

    body: bytes
    """Dropped when no other engine will need it."""
    sent: Callable[[], None]
    """Called when `body` was dropped."""
    content: bytes
    """A digest of what is asked, the same for everybody who asks it."""
    stream: bool
    demand: Demand
    headers: Callable[[], dict[str, str]]
    """What the engine is told about the request, for the running span."""
    tracing: Tracing
    started: float
    """When the request arrived, on `time.perf_counter`."""
    hide_usage: bool
    """Whether the usage is for us only."""
    secrets: tuple[bytes, ...]
    """Texts that must not reach the client: where engines find media."""


class _FailedError(Exception):
    """An engine failed before its first byte; `error` is what the client is told if no other works.

    `reason` is a label of the metric `upstream_failures`.
    """

    def __init__(self, error: ApiError, reason: str) -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason

    @property
    def taken(self) -> bool:
        """Whether the engine had the request."""
        return self.reason not in ("busy", "unreachable", "no_socket")


@dataclass(slots=True)
class _Answer:
    """An answer whose first byte is there."""

    status: int
    first: bytes
    """The body or the beginning of a large one, or the first events of a stream."""
    events: Events | None
    connection: Connection
    whole: bool = True
    """Whether `first` is the whole body."""


class Relay:
    """Answers requests with the help of the engines."""

    def __init__(
        self, router: Router, upstreams: Upstreams, settings: RoutingSettings, metrics: Metrics
    ) -> None:
        self._router = router
        self._upstreams = upstreams
        self._settings = settings
        self._metrics = metrics
        self._quarantine = Quarantine(settings.quarantine_s, metrics)

    async def answer(self, job: Job, scope: Scope, send: Send) -> None:
        """Send the answer to a job.

        Raises:
            ApiError: nothing was sent, and this is what the client is to be told.
        """
        with self._quarantine.admitted(job.content) as on_trial:
            if on_trial and not self._router.has_spare(job.demand):
                raise not_now()
            streamed, rest = await self._asked_in_turn(job, scope, send, on_trial)
        # The engine is free again, however slowly the client reads.
        if rest is None:
            return
        if streamed:
            await _send(send, rest, last=True)
        else:
            await Response(rest, media_type="application/json")(scope, _no_receive, send)

    async def _asked_in_turn(
        self, job: Job, scope: Scope, send: Send, on_trial: bool
    ) -> tuple[bool, bytes | None]:
        """Ask one engine after the other.

        Returns:
            whether the answer was streamed, and what is left to send of it: its end, or all.
        """
        avoid: frozenset[str] = frozenset()
        takers = 1 if on_trial else 2
        while True:
            upstream = await self._router.take(job.demand, avoid)
            outcome: Outcome | None = None
            try:
                span = job.tracing.span("upstream", upstream=upstream.name, attempt=len(avoid))
                async with span, self._asked(upstream, job) as answer:
                    rest: bytes | None
                    streamed = answer.events is not None or not answer.whole
                    if streamed:
                        job.body = b""
                        job.sent()
                    if answer.events is not None:
                        rest, reason = await self._stream(answer, answer.events, job, scope, send)
                    elif streamed:
                        rest, reason = await self._pass_on(answer, job, scope, send)
                    else:
                        rest, reason = self._complete(answer, job), ""
                outcome = await self._outcome(upstream, job, reason)
                return streamed, rest
            except _FailedError as failure:
                outcome = await self._outcome(upstream, job, failure.reason, len(avoid))
                avoid |= {upstream.name}
                takers -= failure.taken
                others = self._router.has_other(job.demand, avoid)
                if not others or not takers or len(avoid) > self._settings.retries:
                    raise failure.error from None
                self._quarantine.check(job.content)  # copies of it may have broken others
            finally:
                self._router.release(upstream, job.demand, outcome)

    async def _outcome(
        self, upstream: Upstream, job: Job, reason: str, attempt: int = 0
    ) -> Outcome | None:
        """What a request says about its engine; `reason` is why it failed, or empty."""
        if not reason:
            self._quarantine.answered(job.content)
            return Outcome.ANSWERED
        if reason == "slow_client":
            return None
        self._metrics.upstream_failures.labels(reason).inc()
        logger.warning(
            "attempt failed: %s", reason, extra={"upstream": upstream.name, "attempt": attempt}
        )
        if reason in ("busy", "no_socket"):
            return None
        dead = self._upstreams.inquire(upstream)
        if reason == "unreachable":
            return Outcome.SILENT
        # vLLM answers all requests with an error when its core has died, and then exits.
        broke = reason in _BROKEN or await dead
        if broke and not upstream.retired:  # those are stopped on purpose
            self._quarantine.broke(job.content, upstream.broke())
        if reason == "timeout":
            return Outcome.SILENT if upstream.silent_for(self._patience(job)) else None
        if reason == "stalled_mid_stream":
            silent = upstream.silent_for(self._settings.idle_timeout_s)
            return Outcome.SILENT if silent else None
        return Outcome.FAILED

    @asynccontextmanager
    async def _asked(self, upstream: Upstream, job: Job) -> AsyncIterator[_Answer]:
        """The answer of one engine; its connection is closed unless the answer is complete."""
        connection: Connection | None = None
        try:
            try:
                async with asyncio.timeout(self._patience(job)):
                    connection = await upstream.connections.take()
                    connection.ask(upstream.chat_head(job.headers(), len(job.body)), job.body)
                    answer = await self._first(connection, job)
            except TimeoutError:
                error = ApiError(504, "The engine did not answer in time.", code="upstream_timeout")
                raise _FailedError(error, "timeout") from None
            except (OSError, BrokenAnswerError) as failure:
                reason = "unreachable" if connection is None else "broken"
                if connection is None and is_local(failure):
                    reason = "no_socket"
                error = ApiError(502, "The engine could not be reached.", code="upstream_error")
                raise _FailedError(error, reason) from None
            except (EngineError, EventTooLargeError):
                raise _failed("no_events") from None
            yield answer
        finally:
            if connection is not None:
                upstream.connections.give_back(connection)

    def _patience(self, job: Job) -> float:
        if job.stream:
            return self._settings.first_byte_timeout_s
        return self._settings.answer_timeout_s

    async def _first(self, connection: Connection, job: Job) -> _Answer:
        await connection.head()
        status = connection.status
        if status in BUSY:
            error = ApiError(429, "The engines are busy.", code="overloaded", retry_after=2)
            raise _FailedError(error, "busy")
        if status != 200 and status not in _PASSED_ON:
            raise _failed(f"status_{status // 100}xx")
        kind = connection.headers.get(b"content-type", b"")
        if status == 200 and kind.lower().startswith(b"text/event-stream"):
            return await self._first_events(connection, Events(hide_usage=job.hide_usage))
        body = bytearray()
        held = MAX_HELD if status == 200 else MAX_REFUSAL
        chunk = b""
        while len(body) <= held and (chunk := await connection.read()):
            body += chunk
        return _Answer(status, bytes(body), None, connection, whole=not chunk or status != 200)

    async def _first_events(self, connection: Connection, events: Events) -> _Answer:
        while data := await connection.read():
            if first := events.feed(data):
                end = events.error_at(first)
                if end is None:
                    return _Answer(200, first, events, connection)
                if end == 0 and (code := _refusal_code(first)):
                    return _Answer(code, first_data(first), None, connection)
                break
        raise EngineError

    def _complete(self, answer: _Answer, job: Job) -> bytes:
        """The body of an answer that is not streamed."""
        if answer.status != 200:
            raise _client_error(answer, job)
        body = _parsed(answer.first)
        if body is None:
            raise _failed("not_json")
        self._count(body.get("usage"), job)
        return answer.first

    async def _stream(
        self, answer: _Answer, events: Events, job: Job, scope: Scope, send: Send
    ) -> tuple[bytes | None, str]:
        """Send a stream without its end; the end, and why it failed if it did."""
        self._metrics.first_token.observe(time.perf_counter() - job.started)
        start = {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
        await send(start)
        writer: BodyWriter = scope["extensions"][BodyWriter.EXTENSION]
        writer.write(without(job.secrets, answer.first))
        stream = Stream(events, answer.connection, writer, job.secrets)
        try:
            reason = await self._run(stream)
        except asyncio.CancelledError:
            # The deadline, or the end of this process; to a client that is gone it does nothing.
            late = ApiError(504, "The request ran out of time.", code="deadline_exceeded")
            if not writer.paused:  # nor does one who does not read
                with suppress(Exception):
                    await _send(send, error_event(late), last=True)
            raise
        if reason == "slow_client":
            return None, reason
        if not reason and not events.done:
            reason = "failed_mid_stream"
        if events.last_usage is not None and (chunk := _parsed(events.last_usage)):
            self._count(chunk.get("usage"), job)
        return stream.rest + (error_event(_broken_off()) if reason else b""), reason

    async def _pass_on(
        self, answer: _Answer, job: Job, scope: Scope, send: Send
    ) -> tuple[bytes | None, str]:
        """Send a large answer without its end; the end, and why it failed if it did.

        What went wrong after its beginning shows in a connection that is cut.
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
            await asyncio.sleep(0)  # until the server has taken note
            return None, reason
        self._count(body.usage, job)
        return stream.rest, ""

    async def _run(self, stream: Stream) -> str:
        """Pass a stream on; why it failed, or empty."""
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

    def _count(self, usage: Any, job: Job) -> None:
        if isinstance(usage, dict):
            self._metrics.usage(usage, time.perf_counter() - job.started)


async def _send(send: Send, data: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": not last})


def _client_error(answer: _Answer, job: Job) -> ApiError:
    """What an engine says is wrong with a request, in the usual form."""
    body = _parsed(without(job.secrets, answer.first)) or {}
    error = body.get("error")
    error = error if isinstance(error, dict) else body
    message, param = error.get("message"), error.get("param")
    return ApiError(
        answer.status,
        message if isinstance(message, str) else "The engine refused the request.",
        code="model_not_found" if answer.status == 404 else "refused_by_engine",
        param=param if isinstance(param, str) else None,
    )


def _refusal_code(events: bytes) -> int | None:
    """The status that a stream of nothing but an error stands for, if the client is to blame.

    vLLM finds some mistakes of a request only when it has promised a stream.
    """
    body = _parsed(first_data(events)) or {}
    error = body.get("error")
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, int) and code in _PASSED_ON else None


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        body = pydantic_core.from_json(data)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _failed(reason: str) -> _FailedError:
    return _FailedError(ApiError(502, "The engine failed.", code="upstream_error"), reason)


def _broken_off() -> ApiError:
    return ApiError(502, "The engine broke off in the middle of the answer.", code="upstream_error")


async def _no_receive() -> Any:
    raise RuntimeError("the body has been read")
