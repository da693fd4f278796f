"""A JSON answer that is passed on in pieces, because it is too large to be held."""

from __future__ import annotations

import json
from typing import Any

_USAGE = b'"usage":'
MAX_USAGE = 64 * 2**10
"""Bytes of the usage; a larger one is not counted."""


class JsonAnswer:
    """Passes all pieces on, and keeps the usage.

    The key cannot be part of a text: there its quotes are escaped.
    """

    def __init__(self) -> None:
        self._kept = b""
        """The usage and what follows it, or what may be the beginning of its key."""
        self._found = False

    def feed(self, data: bytes) -> bytes:
        """The next piece, which is returned."""
        if len(self._kept) >= MAX_USAGE:
            return data
        text = self._kept + data
        if not self._found:
            start = text.find(_USAGE)
            self._found = start >= 0
            self._kept = text[start:] if self._found else text[1 - len(_USAGE) :]
        else:
            self._kept = text
        self._kept = self._kept[:MAX_USAGE]
        return data

    @staticmethod
    def error_at(_: bytes) -> None:
        """An engine says in the head of an answer whether it is an error."""

    @property
    def usage(self) -> Any:
        """The value of the usage, None if there is none."""
        if not self._found:
            return None
        text = self._kept[len(_USAGE) :].decode(errors="ignore").lstrip()
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except ValueError:
            return None
