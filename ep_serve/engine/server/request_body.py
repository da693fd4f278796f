"""Reading the bodies of requests, with bounds on the memory that they take."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING

from vllm.exceptions import GracefulHTTPError

from ep_serve.engine.input.request_memory import RequestMemory, Share

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope

REQUEST_SHARE = 4
"""One request may take this part of the memory for all."""
COPIES = 5
"""How often a body is in memory: bytes, text, data URLs, files.

Estimated: four while a request with a large data URL runs, one more while it is parsed.
"""
VALUE_BYTES = 128
"""Bytes of a JSON value in Python, besides its text."""


class RequestBody:
    """The body of one request; memory is held for it until `release`."""

    def __init__(self, memory: RequestMemory) -> None:
        self._share = Share(memory)
        self._limit = memory.limit // REQUEST_SHARE
        self._messages: list[Message] = []
        self.is_complete = False
        """Whether nothing of the body is left to be read."""

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """Read the body, or up to where the client hung up.

        Raises:
            GracefulHTTPError: it is too large (HTTP 413), or all bodies together are (HTTP 503).
        """
        self._check_size(_content_length(scope))
        size, more = 0, True
        while more:
            message = await receive()
            chunk = message.get("body", b"")
            size += len(chunk)
            self._check_size(size)
            self._share.take(COPIES * len(chunk))
            self._messages.append(message)
            more = message.get("more_body", False)
        self.is_complete = True
        body = b"".join(message.get("body", b"") for message in self._messages)
        if self._messages[-1]["type"] == "http.request":
            self._messages = [{"type": "http.request", "body": body, "more_body": False}]
        self._take_values(body)
        return body

    def replayed(self, receive: Receive) -> Receive:
        """The messages that were read, then those that follow."""
        waiting = iter(self._messages)

        async def replay() -> Message:
            return next(waiting, None) or await receive()

        return replay

    def release(self) -> None:
        self._messages = []
        self._share.release()

    def _check_size(self, size: int) -> None:
        limit = self._limit // COPIES
        if size > limit:
            raise _too_large(f"The request body has at least {size} bytes; the limit is {limit}")

    def _take_values(self, body: bytes) -> None:
        """Hold memory for the values of a JSON body: `[[],[],` needs far more than its text."""
        values = sum(map(body.count, (b",", b"[", b"{")))
        limit = (self._limit - self._share.nbytes) // VALUE_BYTES
        if values > limit:
            raise _too_large(
                f"The request body may have {values} values; the limit for one of {len(body)} "
                f"bytes is {limit}"
            )
        self._share.take(VALUE_BYTES * values)


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value[:20])
    return 0


def _too_large(message: str) -> GracefulHTTPError:
    return GracefulHTTPError(
        f"{message} (request_memory_gib).", HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    )
