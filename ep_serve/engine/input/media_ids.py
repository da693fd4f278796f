"""Ids that clients give media (`uuid`), and the content they stand for.

An id can be sent in place of a medium whose data came with an earlier request. Ids belong to a
scope, the request's `cache_salt`: within one, an id keeps its content for as long as it is
remembered; in another it is another id. Only ids are kept apart by this. Features and tower outputs
are remembered by content, for whoever sends that content, so the time that a request takes tells
whether the same file was processed a moment ago.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

from cachetools import LRUCache
from vllm.exceptions import VLLMValidationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ep_serve.engine.input.medium import Modality

REMEMBERED = 65_536
"""Number of ids that are remembered, the most recently used."""

MAX_CHARS = 256
"""Longest id: as many as `REMEMBERED` are kept in memory."""

_SEPARATOR = "\x1f"
"""Between scope and id; a scope that holds it cannot pass for another, the last one counts."""


class MediaId(NamedTuple):
    """An id in its scope; the ids of different modalities are different ones."""

    modality: Modality
    scoped: str

    @property
    def given(self) -> str:
        """The id as the client wrote it."""
        return self.scoped.rpartition(_SEPARATOR)[2]


def scoped(messages: Sequence[Any], cache_salt: str | None) -> list[Any]:
    """The messages of a chat request, with their ids in the scope of its `cache_salt`.

    Raises:
        VLLMValidationError: an id that is no string or too long (HTTP 400).
    """
    return [
        {**message, "content": [_scoped_part(part, cache_salt) for part in message["content"]]}
        if isinstance(message, dict) and isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _scoped_part(part: Any, cache_salt: str | None) -> Any:
    if not isinstance(part, dict) or (given := part.get("uuid")) is None:
        return part
    if not isinstance(given, str) or len(given) > MAX_CHARS:
        # vLLM makes a string of anything, which would then belong to no scope.
        got = f"{len(given)} characters" if isinstance(given, str) else type(given).__name__
        raise VLLMValidationError(
            f"uuid must be a string of at most {MAX_CHARS} characters (got {got}).",
            parameter="uuid",
        )
    return {**part, "uuid": f"{cache_salt or ''}{_SEPARATOR}{given.replace(_SEPARATOR, '')}"}


class MediaIds:
    """Which content each id stands for. Thread-safe."""

    def __init__(self) -> None:
        self._content: LRUCache[MediaId, bytes] = LRUCache(REMEMBERED)
        self._lock = threading.Lock()

    def content(self, name: MediaId) -> bytes:
        """The content of an id that came without data.

        Raises:
            VLLMValidationError: no content is known for it (HTTP 400).
        """
        with self._lock:
            content = self._content.get(name)
        if content is None:
            raise VLLMValidationError(
                f"uuid {name.given!r} ({name.modality}) is not cached; send its data.",
                parameter="uuid",
            )
        return content

    def check(self, name: MediaId, content: bytes) -> None:
        """Refuse other content under a known id.

        Raises:
            VLLMValidationError: the id stands for something else (HTTP 400).
        """
        with self._lock:
            self._refuse_other(name, content)

    def bind(self, name: MediaId, content: bytes) -> None:
        """Remember the content of an id that was processed; raises as `check` does."""
        with self._lock:
            self._refuse_other(name, content)
            self._content[name] = content

    def _refuse_other(self, name: MediaId, content: bytes) -> None:
        if self._content.get(name, content) != content:
            raise VLLMValidationError(
                f"uuid {name.given!r} ({name.modality}) already refers to other content; "
                "send this content under another id.",
                parameter="uuid",
            )
