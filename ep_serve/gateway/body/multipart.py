"""Incremental parser of multipart uploads, without a second copy on disk."""

from __future__ import annotations

from email.message import Message

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from ep_serve.gateway.errors import ApiError, invalid

MAX_FIELD = 4_096
MAX_PARTS = 16
FILE_FIELD = "file"


class Form:
    """A multipart form with one file and a few short fields, fed in chunks.

    Raises:
        ApiError: 400 for a malformed form, 415 for another content type.
    """

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary or len(boundary) > 256:
            raise ApiError(
                415,
                "The content type must be multipart/form-data.",
                code="unsupported_content_type",
            )
        self.fields: dict[str, str] = {}
        self.file_name: str | None = None
        self.complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_end": self._end,
            },
        )
        self._parts = 0
        self._name = ""
        self._value = bytearray()
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._file: list[bytes] = []

    def feed(self, data: bytes) -> bytes:
        """Parse a chunk and return the file content in it."""
        try:
            self._parser.write(data)
        except MultipartParseError:
            raise invalid("The multipart body is malformed.", code="invalid_form") from None
        file, self._file = self._file, []
        return b"".join(file)

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise invalid(f"A form may have at most {MAX_PARTS} fields.", code="invalid_form")
        self._value = bytearray()
        self._disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == FILE_FIELD:
            if self.file_name is not None:
                raise invalid("A form may have only one file.", FILE_FIELD)
            name = options.get(b"filename", b"").decode("utf-8", "replace")
            self.file_name = "".join(c for c in name if c.isprintable())[:255] or "upload"

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE_FIELD:
            self._file.append(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD:
            raise invalid(f"A form field may have at most {MAX_FIELD} bytes.", self._name[:64])

    def _part_end(self) -> None:
        if self._name != FILE_FIELD:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self.complete = True


def disposition(name: str) -> str:
    """Return a Content-Disposition header for a client's file name."""
    message = Message()
    message.add_header("Content-Disposition", "attachment", filename=("utf-8", "", name))
    return str(message["Content-Disposition"])
