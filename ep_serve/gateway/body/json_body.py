"""Incremental JSON body reader that bounds the cost of parsing.

Inlined media, most of a large body, are decoded as they arrive and are not part of the parsed
object. The rest is bounded in size, depth and number of values before it is parsed.
"""

from __future__ import annotations

import json
import re
import secrets
import sys
from typing import TYPE_CHECKING, Any

import pydantic_core

from ep_serve.gateway.body.json_values import find_leaf, has_surrogate
from ep_serve.gateway.errors import ApiError, invalid
from ep_serve.gateway.media.inlined import MIN_MEDIA_BYTES, InlinedMedium

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_DEPTH = 100
MAX_VALUES = 100_000
MEDIA_KEYS = (b'"url"', b'"data"', b'"file_data"')
"""Keys of content parts whose values can be inlined media."""

_REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SHORT_STRINGS = re.compile(
    rb'(?:[^"\\]*+"[^"\\]{0,512}+(?:\\.[^"\\]{0,512}+){0,64}+")*+', re.DOTALL
)
"""Complete strings and the text between them."""
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LONGEST_KEY = 64
"""Bytes of a key, a colon and surrounding whitespace."""
_LONGEST_ESCAPE = len(b"\\u0000")


class JsonBody:
    """A JSON object that arrives in chunks: `feed` each chunk, then `parse`.

    Args:
        max_text_bytes: size without the media that are set aside.
        max_values: limit of JSON values.
        media_keys: keys, with quotes, whose long strings are decoded as media.
    """

    def __init__(
        self,
        max_text_bytes: int,
        *,
        max_values: int = MAX_VALUES,
        media_keys: tuple[bytes, ...] = MEDIA_KEYS,
    ) -> None:
        self.media: dict[str, InlinedMedium] = {}
        """Inlined media by the placeholder string in the parsed object."""
        self.values = 1
        self._max_text_bytes = max_text_bytes
        self._max_values = max_values
        self._media_keys = media_keys
        self._text = bytearray()
        self._depth = 0
        self._cut_escape = b""
        self._start: int | None = None
        """Offset of the current string in the text, None outside strings."""
        self._may_be_medium = False
        self._medium: InlinedMedium | None = None

    def has_any(self, words: Iterable[bytes]) -> bool:
        """Return whether the text, which `parse` drops, contains one of the words."""
        return any(word in self._text for word in words)

    @property
    def text_bytes(self) -> int:
        """Size of the text without inlined media."""
        return len(self._text)

    @property
    def all_media(self) -> list[InlinedMedium]:
        """The media, including an incomplete one."""
        return [*self.media.values(), *([] if self._medium is None else [self._medium])]

    @property
    def memory_bytes(self) -> int:
        """Memory of text and media."""
        return len(self._text) + sum(medium.memory_bytes for medium in self.all_media)

    @property
    def parsed_bytes(self) -> int:
        """Upper bound of the memory including the parsed object."""
        one_byte_each = self._text.isascii() and b"\\u" not in self._text
        more = len(self._text) * (0 if one_byte_each else 3) + 200 * self.values
        return self.memory_bytes + more

    def feed(self, data: bytes) -> None:
        """Read the next chunk.

        Raises:
            ApiError: 400 for too many or too deeply nested values, 413 for too much text.
        """
        if self._cut_escape:
            data = self._cut_escape + data
            self._cut_escape = b""
        position = 0
        while position < len(data):
            read = self._read_structure if self._start is None else self._read_string
            position = read(data, position)
        if len(self._text) > self._max_text_bytes:
            raise ApiError(
                413,
                f"A body may have at most {self._max_text_bytes} bytes besides inlined media.",
                code="body_too_large",
            )

    def parse(self) -> dict[str, Any]:
        """Parse the object and drop the text.

        Raises:
            ApiError: 400 for invalid JSON.
        """
        text, self._text = self._text, bytearray()
        try:
            body = pydantic_core.from_json(text)
        except ValueError as error:
            raise _not_json(text, error) from None
        if not isinstance(body, dict):
            raise invalid("The body must be a JSON object.", code="invalid_json")
        return body

    def _read_structure(self, data: bytes, position: int) -> int:
        end = data.find(b'"', position)
        if end >= 0:
            end = _end(_SHORT_STRINGS, data, position)
            self._count(_STRING.sub(b"", data[position:end]))
            self._text += data[position:end]
            position = end
            end = data.find(b'"', position)
        if end < 0:
            end = len(data)
        self._count(data[position:end])
        self._text += data[position:end]
        if end < len(data):
            before = bytes(self._text[-_LONGEST_KEY:]).rstrip()
            is_value = before.endswith(b":")
            self._may_be_medium = is_value and before[:-1].rstrip().endswith(self._media_keys)
            self._start = len(self._text)
            self._text += b'"'
        return end + 1

    def _count(self, structure: bytes) -> None:
        """Count the values that begin in the text between two strings."""
        if not structure:
            return
        brackets = structure.translate(None, _NO_BRACKETS)
        self.values += structure.count(b",") + brackets.count(b"[") + brackets.count(b"{")
        if self.values > self._max_values:
            raise invalid(
                f"The body may have at most {self._max_values} values.", code="too_many_values"
            )
        for bracket in brackets:
            self._depth += 1 if bracket in b"[{" else -1
            if self._depth > MAX_DEPTH:
                raise invalid(
                    f"The values of the body may be nested at most {MAX_DEPTH} deep.",
                    code="too_deep",
                )
            if self._depth < 0:
                raise invalid(
                    "The body is not valid JSON: unbalanced closing bracket.",
                    code="invalid_json",
                )

    def _read_string(self, data: bytes, position: int) -> int:
        end = data.find(b'"', position)
        closed = end >= 0
        if not closed:
            end = len(data)
        if data.find(b"\\", position, end) >= 0:
            end = _end(_REST_OF_STRING, data, position, len(data))
            closed = data[end : end + 1] == b'"'
            if not closed:
                # An incomplete escape is kept for the next chunk.
                cut = data.rfind(b"\\", max(position, len(data) - _LONGEST_ESCAPE + 1))
                end = len(data) if cut < 0 else _end(_REST_OF_STRING, data, position, cut)
                self._cut_escape = data[end:]
        self._append(data[position:end])
        if closed:
            self._close_string()
        return end + 1 if closed else len(data)

    def _append(self, piece: bytes) -> None:
        assert self._start is not None
        if self._medium is None:
            self._text += piece
            if not self._may_be_medium or len(self._text) - self._start <= MIN_MEDIA_BYTES:
                return
            self._medium = InlinedMedium(bytes(self._text[self._start + 1 :]))
            del self._text[self._start + 1 :]
        else:
            self._medium.feed(piece)

    def _close_string(self) -> None:
        assert self._start is not None
        if self._medium is not None:
            name = secrets.token_hex(16)  # unguessable for clients
            self._medium.close()
            self.media[name], self._medium = self._medium, None
            self._text += name.encode()
        self._text += b'"'
        self._start = None


def _not_json(text: bytearray, error: ValueError) -> ApiError:
    if text.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        message = "The body must be UTF-8 without a byte order mark."
        return invalid(message, code="invalid_json")
    if b"\\u" in text:
        try:  # Python's parser accepts lone surrogates, so the error can name them
            place = find_leaf(json.loads(text), has_surrogate)
        except ValueError:
            place = None
        if place is not None:
            message = f"{place} contains a lone surrogate."
            return invalid(message, place, code="invalid_json")
    return invalid(f"The body is not valid JSON: {error}.", code="invalid_json")


def _end(pattern: re.Pattern[bytes], data: bytes, position: int, limit: int = sys.maxsize) -> int:
    found = pattern.match(data, position, limit)
    assert found is not None  # the patterns also match the empty string
    return found.end()
