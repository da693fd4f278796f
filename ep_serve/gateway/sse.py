"""Server-sent events as they pass through: only whole ones, and an error as the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pydantic_core

if TYPE_CHECKING:
    from ep_serve.gateway.errors import ApiError

DONE = b"data: [DONE]"
_ERROR = b'data: {"error"'
MAX_EVENT = 16 * 2**20


class EventTooLargeError(Exception):
    """An engine sent an event without end."""


class Events:
    """Cuts a stream of bytes where an event ends, so that a client never gets half of one."""

    def __init__(self) -> None:
        self.done = False
        self.count = 0
        self.last_usage: bytes | None = None
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """The whole events that `data` completes."""
        data = self._rest + data if self._rest else data
        end = data.rfind(b"\n\n")
        if end < 0:
            if len(data) > MAX_EVENT:
                raise EventTooLargeError
            self._rest = data
            return b""
        whole, self._rest = data[: end + 2], data[end + 2 :]
        self.count += whole.count(b"\n\n")
        if b'"usage":{' in whole:
            self._note_usage(whole)
        if DONE in whole and (whole.startswith(DONE) or b"\n\n" + DONE in whole):
            self.done = True
        return whole

    @staticmethod
    def error_at(whole: bytes) -> int | None:
        """Where an engine's own error event begins; its text is not for clients."""
        if whole.startswith(_ERROR):
            return 0
        end = whole.find(b"\n\n" + _ERROR)
        return None if end < 0 else end + 2

    def _note_usage(self, whole: bytes) -> None:
        for event in reversed(whole.split(b"\n\n")):
            if b'"usage":{' in event:
                self.last_usage = event.removeprefix(b"data: ")
                return


def error_event(error: ApiError) -> bytes:
    """What ends a stream that cannot go on."""
    return b"data: " + pydantic_core.to_json(error.body) + b"\n\n" + DONE + b"\n\n"
