"""Incremental decoding of base64 media in a JSON body."""

from __future__ import annotations

import binascii
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ep_serve.gateway.media.store.upload import Upload

MIN_MEDIA_BYTES = 16 * 2**10
"""Shorter strings of a JSON body stay in its text."""
_BLOCK = 64 * 2**10
"""Characters that are decoded together."""
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
"""JSON escapes of base64 characters that serializers use."""


class InlinedMedium:
    """A base64 JSON string or data URL: `feed` it in chunks, then `close`.

    Args:
        text: the start of the string, at least 256 bytes if it has as many. Start and chunks may
            contain complete JSON escapes.
    """

    def __init__(self, text: bytes) -> None:
        self.start = b""
        """The part of a data URL before its content."""
        self.pieces: list[bytes] = []
        """Decoded content in memory."""
        self.upload: Upload | None = None
        """The upload with the content before `pieces`."""
        self.valid = True
        """Whether the content is valid base64; otherwise it is dropped."""
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
                raise ValueError("data after the base64 padding")
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
    return text  # other escapes are rejected as invalid base64
