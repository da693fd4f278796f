"""Server-sent events as they pass through: only whole ones, and an error as the last one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pydantic_core

if TYPE_CHECKING:
    from ep_serve.gateway.errors import ApiError

DATA = b"data: "
DONE = b"data: [DONE]"
_ERROR = b'data: {"error"'
_USAGE = b'"usage"'
_FINISHED = b'"finish_reason":"'
_FINGERPRINT = b'"system_fingerprint"'
MAX_EVENT = 4 * 2**20


class EventTooLargeError(Exception):
    """An engine sent an event without end."""


class Events:
    """Cuts a stream of bytes where an event ends, so that a client never gets half of one.

    Args:
        hide_usage: keep the event with the usage from a client that did not ask for it.
    """

    def __init__(self, *, hide_usage: bool = False) -> None:
        self.done = False
        self.count = 0
        self.last_usage: bytes | None = None
        self._rest = b""
        self._hide_usage = hide_usage
        self._held = b""

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
        return self._without_usage(whole) if self._hide_usage else whole

    @staticmethod
    def error_at(whole: bytes) -> int | None:
        """Where an engine's own error event begins; its text is not for clients."""
        if whole.startswith(_ERROR):
            return 0
        end = whole.find(b"\n\n" + _ERROR)
        return None if end < 0 else end + 2

    def _without_usage(self, whole: bytes) -> bytes:
        """Events as they are for a client that did not ask for the usage.

        There is one less, and vLLM's fingerprint, which is in it, is where vLLM has it otherwise:
        at the end of the event before. That one waits until the usage is there, at once.
        """
        if not self._held and _FINISHED not in whole and _USAGE not in whole:
            return whole
        kept: list[bytes] = []
        for event in (self._held + whole).split(b"\n\n")[:-1]:
            usage = _only_usage(event) if _USAGE in event else None
            if usage is None:
                kept.append(event)
                continue
            self.last_usage = event.removeprefix(DATA)
            self._hide_usage = False
            stamp = usage.get("system_fingerprint")
            if isinstance(stamp, str) and kept and _lacks_fingerprint(kept[-1]):
                kept[-1] = b"%b,%b:%b}" % (
                    kept[-1][:-1],
                    _FINGERPRINT,
                    pydantic_core.to_json(stamp),
                )
        waits = self._hide_usage and bool(kept) and _FINISHED in kept[-1]
        self._held = kept.pop() + b"\n\n" if waits else b""
        return b"".join(event + b"\n\n" for event in kept)

    def _note_usage(self, whole: bytes) -> None:
        for event in reversed(whole.split(b"\n\n")):
            if b'"usage":{' in event:
                self.last_usage = event.removeprefix(DATA)
                return


def _only_usage(event: bytes) -> dict[str, Any] | None:
    """An event that has a usage and no piece of an answer."""
    try:
        chunk = pydantic_core.from_json(event.removeprefix(DATA))
    except ValueError:
        return None
    alone = isinstance(chunk, dict) and chunk.get("choices") == [] and chunk.get("usage")
    return chunk if alone else None


def _lacks_fingerprint(event: bytes) -> bool:
    return _FINISHED in event and event.endswith(b"}") and _FINGERPRINT not in event


def first_data(events: bytes) -> bytes:
    """What the first of some events holds."""
    return events[len(DATA) : events.index(b"\n\n")]


def error_event(error: ApiError) -> bytes:
    """What ends a stream that cannot go on."""
    return DATA + pydantic_core.to_json(error.body) + b"\n\n" + DONE + b"\n\n"
