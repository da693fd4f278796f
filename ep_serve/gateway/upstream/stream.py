"""An engine's stream on its way to the client, piece by piece and without a task of its own."""

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
    """An engine reports an error in the middle of its stream."""


class StalledError(Exception):
    """An engine pauses in the middle of its stream for too long."""


class SlowClientError(Exception):
    """A client has not read for as long as an engine may pause."""


class Stream:
    """Passes whole events on, or the pieces of a large JSON answer.

    `rest` is what remains to be sent when the stream has ended: its last events.
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
        """Until the end of the stream.

        Raises:
            BrokenAnswerError: the engine broke off.
            StalledError: it paused for too long.
            EngineError: it said so itself.
            EventTooLargeError: an event without end.
            SlowClientError: the client is at fault, not the engine.
        """
        self._patience = _Patience(idle_timeout_s, self._connection.abort)
        try:
            await self._connection.deliver(self._take)
        except BrokenAnswerError:
            if self._draining is not None:
                raise SlowClientError from None
            if self._patience.over:
                raise StalledError from None
            raise
        finally:
            self._patience.end()
            if self._draining is not None:
                self._draining.cancel()

    def clean(self, data: bytes) -> bytes:
        """An engine's text without the places where it finds media."""
        return without(self._secrets, data)

    def _take(self, data: bytes, last: bool) -> None:
        self._patience.renew()
        whole = self._events.feed(data)
        end = self._events.error_at(whole)
        if end is not None:
            self.rest = self.clean(whole[:end])
            raise EngineError
        if last:
            self.rest = self.clean(whole)
        elif whole:
            self._writer.write(self.clean(whole))
            if self._writer.paused and self._draining is None:
                self._connection.pause()
                self._draining = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        """A client that reads slowly makes the engine wait, not the gateway's memory grow."""
        await self._writer.drain()
        self._draining = None
        self._patience.renew()
        self._connection.resume()


class _Patience:
    """Ends a stream that pauses too long. One timer for all its chunks, not one for each."""

    def __init__(self, seconds: float, end: Callable[[], Any]) -> None:
        self.over = False
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
            self.over = True
            self._end()
        else:
            self._timer = self._loop.call_later(left, self._check)


def without(secrets: tuple[bytes, ...], data: bytes) -> bytes:
    """A text in which "media:" stands for each of these secrets."""
    for secret in secrets:
        if secret in data:
            data = data.replace(secret, b"media:")
    return data
