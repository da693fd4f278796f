"""Sending a request to an engine and its answer to the client.

As long as the client has seen nothing, another engine may be tried. From the first byte on the
answer is either complete or ends with an error event.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aiohttp
import pydantic_core
from starlette.responses import Response

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.sse import Events, EventTooLargeError, error_event
from ep_serve.gateway.upstreams import Upstream, request_options

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import Scope, Send

    from ep_serve.gateway.context import Context
    from ep_serve.gateway.metrics import Metrics
    from ep_serve.gateway.routing import Demand, Router
    from ep_serve.gateway.settings import RoutingSettings
    from ep_serve.gateway.upstreams import Upstreams

logger = logging.getLogger(__name__)

MAX_ANSWER = 256 * 2**20
_PASSED_ON = frozenset({400, 404, 413, 422})
_BROKEN = (aiohttp.ClientError, OSError, TimeoutError, EventTooLargeError)


@dataclass(frozen=True, slots=True)
class Job:
    """One request, ready to be sent."""

    body: bytes
    stream: bool
    demand: Demand
    context: Context
    secrets: tuple[bytes, ...]
    """Texts that must not reach the client: where engines find media."""


class _FailedError(Exception):
    """An engine failed before its first byte; `error` is what the client is told if no other works.

    `blame` is whether the engine is at fault.
    """

    def __init__(self, error: ApiError, reason: str, *, blame: bool = True) -> None:
        super().__init__(reason)
        self.error = error
        self.reason = reason
        self.blame = blame


@dataclass(slots=True)
class _Answer:
    """An answer whose first byte is there."""

    status: int
    first: bytes
    """The whole body, or the first events of a stream."""
    events: Events | None
    response: aiohttp.ClientResponse


class Relay:
    """Answers requests with the help of the engines."""

    def __init__(
        self, router: Router, upstreams: Upstreams, settings: RoutingSettings, metrics: Metrics
    ) -> None:
        self._router = router
        self._upstreams = upstreams
        self._settings = settings
        self._metrics = metrics

    async def answer(self, job: Job, scope: Scope, send: Send) -> None:
        """Send the answer to a job.

        Raises:
            ApiError: nothing was sent, and this is what the client is to be told.
        """
        avoid: frozenset[str] = frozenset()
        for attempt in range(self._settings.retries + 1):
            upstream = await self._router.take(job.demand, avoid)
            failed: bool | None = None
            try:
                async with self._asked(upstream, job) as answer:
                    failed = answer.status >= 500
                    failed = await self._deliver(answer, job, scope, send) or failed
                    return
            except _FailedError as failure:
                failed = True if failure.blame else None
                avoid |= {upstream.name}
                self._metrics.upstream_failures.labels(failure.reason).inc()
                logger.warning(
                    "attempt failed: %s",
                    failure.reason,
                    extra={"upstream": upstream.name, "attempt": attempt},
                )
                error = failure.error
                if failure.reason == "timeout" and not self._router.has_other(job.demand, avoid):
                    raise error from None
            finally:
                self._router.release(upstream, job.demand, failed)
        raise error

    @asynccontextmanager
    async def _asked(self, upstream: Upstream, job: Job) -> AsyncIterator[_Answer]:
        """The answer of one engine; its connection is closed at the end, finished or not."""
        options = request_options(upstream)
        options["headers"] |= job.context.upstream_headers()
        options["headers"]["content-type"] = "application/json"
        response: aiohttp.ClientResponse | None = None
        try:
            try:
                async with asyncio.timeout(self._patience(job)):
                    response = await self._upstreams.session.post(
                        upstream.url / "v1" / "chat" / "completions", data=job.body, **options
                    )
                    answer = await self._first(response)
            except TimeoutError:
                error = ApiError(504, "The engine did not answer in time.", code="upstream_timeout")
                raise _FailedError(error, "timeout") from None
            except _BROKEN as broken:
                refused = isinstance(broken, aiohttp.ClientConnectorError)
                error = ApiError(502, "The engine could not be reached.", code="upstream_error")
                raise _FailedError(error, "unreachable" if refused else "broken") from None
            yield answer
        finally:
            if response is not None:
                response.close()

    def _patience(self, job: Job) -> float:
        if job.stream:
            return self._settings.first_byte_timeout_s
        return self._settings.answer_timeout_s

    async def _first(self, response: aiohttp.ClientResponse) -> _Answer:
        status = response.status
        if status == 429 or status == 503:
            error = ApiError(429, "The engines are busy.", code="overloaded", retry_after=2)
            raise _FailedError(error, "busy", blame=False)
        if status != 200 and status not in _PASSED_ON:
            error = ApiError(502, "The engine failed.", code="upstream_error")
            raise _FailedError(error, f"status_{status // 100}xx")
        if status == 200 and response.content_type == "text/event-stream":
            events = Events()
            async for data in response.content.iter_any():
                if first := events.feed(data):
                    if events.error_at(first) is not None:
                        break
                    return _Answer(status, first, events, response)
            raise aiohttp.ClientPayloadError
        body = await response.content.read(MAX_ANSWER)
        while chunk := await response.content.read(MAX_ANSWER):
            body += chunk
            if len(body) > MAX_ANSWER:
                raise aiohttp.ClientPayloadError
        return _Answer(status, body, None, response)

    async def _deliver(self, answer: _Answer, job: Job, scope: Scope, send: Send) -> bool:
        """Send an answer; True if the engine failed on the way."""
        if answer.events is not None:
            return await self._stream(answer, answer.events, job, send)
        if answer.status != 200:
            raise _client_error(answer, job)
        body = _parsed(answer.first)
        if body is None:
            error = ApiError(502, "The engine failed.", code="upstream_error")
            raise _FailedError(error, "not_json")
        self._count(body.get("usage"), job)
        response = Response(answer.first, media_type="application/json")
        await response(scope, _no_receive, send)
        return False

    async def _stream(self, answer: _Answer, events: Events, job: Job, send: Send) -> bool:
        self._metrics.first_token.observe(time.perf_counter() - job.context.started)
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"text/event-stream; charset=utf-8"),
                    (b"cache-control", b"no-cache"),
                    (b"x-accel-buffering", b"no"),
                ],
            }
        )
        await _send(send, _clean(answer.first, job))
        error: ApiError | None = None
        patience = _Patience(self._settings.idle_timeout_s, answer.response.close)
        try:
            while data := await answer.response.content.readany():
                patience.renew()
                whole = events.feed(data)
                if (end := events.error_at(whole)) is not None:
                    await _send(send, _clean(whole[:end], job))
                    error = _broken_off()
                    break
                if whole:
                    await _send(send, _clean(whole, job))
        except _BROKEN:
            error = _broken_off()
        except asyncio.CancelledError:
            # The deadline, or the end of this process; to a client that is gone it does nothing.
            late = ApiError(504, "The request ran out of time.", code="deadline_exceeded")
            with suppress(Exception):
                await _send(send, error_event(late), last=True)
            raise
        finally:
            patience.end()
        if not events.done:
            error = error or _broken_off()
        if events.last_usage is not None and (chunk := _parsed(events.last_usage)):
            self._count(chunk.get("usage"), job)
        if error is not None:
            self._metrics.upstream_failures.labels("mid_stream").inc()
            logger.warning("an engine broke off in the middle of an answer")
        await _send(send, error_event(error) if error else b"", last=True)
        return error is not None

    def _count(self, usage: Any, job: Job) -> None:
        if isinstance(usage, dict):
            self._metrics.usage(usage, time.perf_counter() - job.context.started)


class _Patience:
    """Ends a stream that pauses too long. One timer for all its chunks, not one for each."""

    def __init__(self, seconds: float, end: Callable[[], Any]) -> None:
        self._seconds = seconds
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._check)

    def renew(self) -> None:
        self._last = self._loop.time()

    def end(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        left = self._last + self._seconds - self._loop.time()
        if left <= 0:
            self._end()
        else:
            self._timer = self._loop.call_later(left, self._check)


async def _send(send: Send, data: bytes, *, last: bool = False) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": not last})


def _clean(data: bytes, job: Job) -> bytes:
    """An engine's text without the places where it finds media."""
    for secret in job.secrets:
        if secret in data:
            data = data.replace(secret, b"media:")
    return data


def _client_error(answer: _Answer, job: Job) -> ApiError:
    """What an engine says is wrong with a request, in the usual form."""
    body = _parsed(_clean(answer.first, job)) or {}
    error = body.get("error")
    error = error if isinstance(error, dict) else body
    message, param = error.get("message"), error.get("param")
    return ApiError(
        answer.status,
        message if isinstance(message, str) else "The engine refused the request.",
        code="model_not_found" if answer.status == 404 else "refused_by_engine",
        param=param if isinstance(param, str) else None,
    )


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        body = pydantic_core.from_json(data)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _broken_off() -> ApiError:
    return ApiError(502, "The engine broke off in the middle of the answer.", code="upstream_error")


async def _no_receive() -> Any:
    raise RuntimeError("the body has been read")
