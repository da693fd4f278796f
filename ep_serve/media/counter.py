"""How many files were decoded, for statistics and for tests of caches."""

from __future__ import annotations

from collections import Counter
from threading import Lock
from typing import Literal

DecodeKind = Literal["video", "audio", "image"]


class DecodeCounter:
    """Counts decodes by kind; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[DecodeKind] = Counter()

    def add(self, kind: DecodeKind) -> None:
        with self._lock:
            self._counts[kind] += 1

    def value(self, kind: DecodeKind) -> int:
        """Decodes of this kind begun so far in this process."""
        with self._lock:
            return self._counts[kind]


decodes = DecodeCounter()
"""A clip counts as one `video`, and its sound track, where it is read, as one `audio`."""
