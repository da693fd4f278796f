"""Base64 inside a JSON body, decoded piece by piece."""

from __future__ import annotations

import binascii
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ep_serve.gateway.media.store.upload import Upload

MIN_MEDIA_BYTES = 16 * 2**10
"""Strings of a JSON body that are shorter stay in its text."""
_BLOCK = 64 * 2**10
"""Characters that are decoded at once."""
_MAX_START = 256
_ESCAPES = (
    (b"\\/", b"/"),
    (b"\\u002b", b"+"),
    (b"\\u002B", b"+"),
    (b"\\u002f", b"/"),
    (b"\\u002F", b"/"),
    (b"\\u003d", b"="),
    (b"\\u003D", b"="),
)
"""How serializers write the characters of base64 that they escape."""


class InlinedMedium:
    """A JSON string of base64, or a data URL with it. `feed` the rest of it, then `close`.

    Args:
        text: how it begins, at least 256 bytes if it has as many. It may hold escapes of JSON, none
            of them cut, as may what follows.
    """

    def __init__(self, text: bytes) -> None:
        self.start = b""
        """What a data URL has before its content."""
        self.pieces: list[bytes] = []
        """The content that is in memory."""
        self.upload: Upload | None = None
        """Where the content before it is."""
        self.valid = True
        """Whether the content is base64; it is dropped otherwise."""
        self._ended = False
        text = _unescaped(text)
        start = text[:_MAX_START]
        if start.lstrip().lower().startswith(b"data:"):
            self.start = start[: start.find(b",") + 1] or start
        self._text = bytearray(text[len(self.start) :])

    @property
    def memory_bytes(self) -> int:
        return sum(map(len, self.pieces)) + len(self._text)

    def feed(self, text: bytes) -> None:
        if self.valid:
            self._text += _unescaped(text)
            if len(self._text) >= _BLOCK:
                self._decode(len(self._text) // 4 * 4)

    def close(self) -> None:
        self._decode(len(self._text))

    def _decode(self, end: int) -> None:
        try:
            piece = binascii.a2b_base64(self._text[:end], strict_mode=True)
            if piece and self._ended:
                raise ValueError("base64 goes on after its padding")
        except ValueError:
            self.valid = False
            self.pieces.clear()
            self._text.clear()
            return
        if piece:
            self.pieces.append(piece)
            self._ended = self._text[end - 1] == ord("=")
        del self._text[:end]


def _unescaped(text: bytes) -> bytes:
    if b"\\" in text:
        for escape, character in _ESCAPES:
            text = text.replace(escape, character)
    return text  # another escape is not base64, and refused as such
