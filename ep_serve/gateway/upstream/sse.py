"""Split relayed server-sent events and filter usage events out."""

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
    """An event exceeds `MAX_EVENT` bytes."""


class Events:
    """Buffers a byte stream so that only complete events are relayed.

    Args:
        hide_usage: drop the usage event, which the client did not request.
    """

    def __init__(self, *, hide_usage: bool = False) -> None:
        self.done = False
        self.last_usage: bytes | None = None
        self._rest = b""
        self._hide_usage = hide_usage
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Return the events that `data` completes."""
        data = self._rest + data if self._rest else data
        end = data.rfind(b"\n\n")
        if end < 0:
            if len(data) > MAX_EVENT:
                raise EventTooLargeError
            self._rest = data
            return b""
        whole, self._rest = data[: end + 2], data[end + 2 :]
        if b'"usage":{' in whole:
            self._save_usage(whole)
        if DONE in whole and (whole.startswith(DONE) or b"\n\n" + DONE in whole):
            self.done = True
        return self._without_usage(whole) if self._hide_usage else whole

    @staticmethod
    def error_at(whole: bytes) -> int | None:
        """Return the offset of an engine's error event, whose text is not for clients."""
        if whole.startswith(_ERROR):
            return 0
        end = whole.find(b"\n\n" + _ERROR)
        return None if end < 0 else end + 2

    def _without_usage(self, whole: bytes) -> bytes:
        """Drop the usage event and move vLLM's fingerprint from it to the event before.

        That is where vLLM sends the fingerprint when no usage is requested, so the last event of
        an answer is held back until the usage arrives.
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

    def _save_usage(self, whole: bytes) -> None:
        for event in reversed(whole.split(b"\n\n")):
            if b'"usage":{' in event:
                self.last_usage = event.removeprefix(DATA)
                return


def _only_usage(event: bytes) -> dict[str, Any] | None:
    """Parse an event that has a usage and no choices; None for other events."""
    try:
        chunk = pydantic_core.from_json(event.removeprefix(DATA))
    except ValueError:
        return None
    alone = isinstance(chunk, dict) and chunk.get("choices") == [] and chunk.get("usage")
    return chunk if alone else None


def _lacks_fingerprint(event: bytes) -> bool:
    return _FINISHED in event and event.endswith(b"}") and _FINGERPRINT not in event


def first_event_data(events: bytes) -> bytes:
    """Return the data of the first event."""
    return events[len(DATA) : events.index(b"\n\n")]


def error_event(error: ApiError) -> bytes:
    """Return an error event and the end of the stream."""
    return DATA + pydantic_core.to_json(error.body) + b"\n\n" + DONE + b"\n\n"
