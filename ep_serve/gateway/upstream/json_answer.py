"""Extract the usage of a large JSON response while it is relayed in chunks."""

from __future__ import annotations

import json
from typing import Any

_USAGE = b'"usage":'
MAX_USAGE = 64 * 2**10
"""Bytes of the usage; a larger one is not counted."""


class JsonAnswer:
    """Returns each chunk unchanged and collects the value of `"usage"`.

    The key cannot occur inside a string, where its quotes are escaped.
    """

    def __init__(self) -> None:
        self._kept = b""
        """The usage and the bytes after it, or bytes that may be the start of its key."""
        self._found = False

    def feed(self, data: bytes) -> bytes:
        """Scan the next chunk and return it."""
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
        """Return None: the status of the response tells whether it is an error."""

    @property
    def usage(self) -> Any:
        """The parsed usage, or None."""
        if not self._found:
            return None
        text = self._kept[len(_USAGE) :].decode(errors="ignore").lstrip()
        try:
            return json.JSONDecoder().raw_decode(text)[0]
        except ValueError:
            return None
