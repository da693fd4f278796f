"""Relay an engine's streamed response to the client without a task for each stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ep_serve.gateway.upstream.connection import BrokenAnswerError, Connection
from ep_serve.gateway.upstream.json_answer import JsonAnswer
from ep_serve.gateway.upstream.sse import Events

if TYPE_CHECKING:
    from ep_serve.gateway.http.body_writer import BodyWriter


class EngineError(Exception):
    """An engine sent an error event in the middle of its stream."""


class StalledError(Exception):
    """An engine exceeded the idle timeout in the middle of its stream."""


class SlowClientError(Exception):
    """A client did not read its response within the idle timeout."""


class Stream:
    """Relays complete events, or the chunks of a large JSON response.

    `rest` holds the last events, which are not sent yet when the stream has ended.
    """

    def __init__(
        self,
        events: Events | JsonAnswer,
        connection: Connection,
        writer: BodyWriter,
        secrets: tuple[bytes, ...],
    ) -> None:
        self.rest = b""
        self._events = events
        self._connection = connection
        self._writer = writer
        self._secrets = secrets
        self._draining: asyncio.Task[None] | None = None

    async def run(self, idle_timeout_s: float) -> None:
        """Relay until the stream ends.

        Raises:
            BrokenAnswerError: the connection ended early.
            StalledError: the engine exceeded the idle timeout.
            EngineError: the engine sent an error event.
            EventTooLargeError: an event exceeds `sse.MAX_EVENT`.
            SlowClientError: the client did not read.
        """
        self._idle_timer = _IdleTimer(idle_timeout_s, self._connection.abort)
        try:
            await self._connection.deliver(self._on_data)
        except BrokenAnswerError:
            if self._draining is not None:
                raise SlowClientError from None
            if self._idle_timer.has_expired:
                raise StalledError from None
            raise
        finally:
            self._idle_timer.cancel()
            if self._draining is not None:
                self._draining.cancel()

    def _redact(self, data: bytes) -> bytes:
        return redact(self._secrets, data)

    def _on_data(self, data: bytes, last: bool) -> None:
        self._idle_timer.reset()
        whole = self._events.feed(data)
        end = self._events.error_at(whole)
        if end is not None:
            self.rest = self._redact(whole[:end])
            raise EngineError
        if last:
            self.rest = self._redact(whole)
        elif whole:
            self._writer.write(self._redact(whole))
            if self._writer.paused and self._draining is None:
                self._connection.pause()
                self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """Apply back-pressure to the engine until the client has read what is buffered."""
        await self._writer.drain()
        self._draining = None
        self._idle_timer.reset()
        self._connection.resume()


class _IdleTimer:
    """Calls `on_expiry` after `seconds` without a `reset`, with one timer for all resets."""

    def __init__(self, seconds: float, on_expiry: Callable[[], Any]) -> None:
        self.has_expired = False
        self._seconds = seconds
        self._on_expiry = on_expiry
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._timer = self._loop.call_later(seconds, self._check)

    def reset(self) -> None:
        self._last = self._loop.time()

    def cancel(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        left = self._last + self._seconds - self._loop.time()
        if left <= 0:
            self.has_expired = True
            self._on_expiry()
        else:
            self._timer = self._loop.call_later(left, self._check)


def redact(secrets: tuple[bytes, ...], data: bytes) -> bytes:
    """Replace each of the secrets in a text with `media:`."""
    for secret in secrets:
        if secret in data:
            data = data.replace(secret, b"media:")
    return data
