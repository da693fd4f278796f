"""Detect truncated media files from the sizes and durations in their headers.

FFmpeg reads a truncated file as a shorter one, about which the model would answer wrongly. MPEG
streams and raw AAC do not state their length.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

_SLACK = 64
"""Tolerance for sizes in WAV files: some programs include the header."""
_MP3_SLACK = 2_048
"""Tolerance for tags removed from an MP3 file after encoding."""
_OGG_PAGE = 65_307
"""Maximum size of an Ogg page."""
_STREAMED = 0x7FFF_0000
"""Sizes from here on, and 0, are placeholders of programs that cannot seek back."""
_MAX_CHUNKS = 100_000
"""Maximum number of chunks of a file that are read."""

_DATA_BOXES = frozenset({b"moov", b"moof", b"mdat"})
_BOXES = _DATA_BOXES | {
    *(b"ftyp", b"styp", b"free", b"skip", b"wide", b"uuid", b"meta", b"sidx", b"mfra", b"pnot"),
    *(b"udta", b"emsg", b"prft"),
}
"""Top-level boxes of the MP4 family (ISO/IEC 14496-12)."""

_EXACT_S, _ROUNDED_S, _ROUNDED_SHARE = 0.1, 1.0, 0.1
_STATED = {
    "flac": (_EXACT_S, 0.0),
    "matroska": (_ROUNDED_S, _ROUNDED_SHARE),
    "flv": (_ROUNDED_S, _ROUNDED_SHARE),
}
"""Containers that state their duration, with the absolute and relative tolerance."""


def missing_seconds(container: str, stated_s: float, reached_s: float) -> bool:
    """Return whether a file's packets end well before the duration in its header.

    Args:
        container: FFmpeg's name of its demuxer.
        stated_s: duration in the header.
        reached_s: end of the last packet.
    """
    for name, (seconds, share) in _STATED.items():
        if name in container.split(","):
            return stated_s - reached_s > max(seconds, share * stated_s)
    return False


def missing_bytes(file: BinaryIO) -> str | None:
    """Describe how a file is truncated, or return None; rewinds the file."""
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(12)
    end = None
    if head[:4] == b"RIFF" and head[8:12] in (b"WAVE", b"AVI "):
        end = _riff_end(file, size)
    elif head[4:8] in _BOXES:
        end = _boxes_end(file, size)
    elif head[:4] == b"\x1aE\xdf\xa3":
        end = _matroska_end(file)
    elif head[:4] == b"OggS":
        end = _ogg_end(file, size)
    elif head[:3] == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0"):
        end = _mp3_end(file)
    file.seek(0)
    if end is None or end <= size:
        return None
    return f"by its own structure it has at least {end} bytes, the file holds {size}"


def _riff_end(file: BinaryIO, size: int) -> int | None:
    at = 0
    for _ in range(_MAX_CHUNKS):  # an AVI file of more than a gigabyte has several
        file.seek(at)
        head = file.read(12)
        if len(head) < 12 or head[:4] != b"RIFF":
            return None
        if head[8:] == b"WAVE":
            return _wave_end(file, size)
        length = int.from_bytes(head[4:8], "little")
        if not 0 < length < _STREAMED:
            return None
        at += 8 + length + length % 2
        if at > size:
            return at - _SLACK
    return None


def _wave_end(file: BinaryIO, size: int) -> int | None:
    """Return the end of the `data` chunk; `file` is at the first chunk."""
    for _ in range(_MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            return None
        name, length = struct.unpack("<4sI", head)
        if name == b"data":
            return file.tell() + length - _SLACK if 0 < length < _STREAMED else None
        if file.seek(length + length % 2, 1) > size:
            return None
    return None


def _boxes_end(file: BinaryIO, size: int) -> int | None:
    at = 0
    for _ in range(_MAX_CHUNKS):
        file.seek(at)
        head = file.read(16)
        length, name = int.from_bytes(head[:4], "big"), head[4:8]
        if name not in _BOXES:  # the end, or trailing data
            return None
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0: to the end of the file
            return None
        at += length
        if at > size:
            return at if name in _DATA_BOXES else None
    return None


def _matroska_end(file: BinaryIO) -> int | None:
    file.seek(4)
    header = _matroska_size(file)
    if header is None:
        return None
    file.seek(header, 1)
    if file.read(4) != b"\x18\x53\x80\x67":
        return None
    segment = _matroska_size(file)
    return None if segment is None else file.tell() + segment


def _matroska_size(file: BinaryIO) -> int | None:
    """Return the size of an element; None if unknown, as in live recordings (RFC 8794, 4.1)."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    unknown = (1 << 7 * length) - 1
    value = int.from_bytes(first + file.read(length - 1), "big") & unknown
    return None if value == unknown else value


def _ogg_end(file: BinaryIO, size: int) -> int | None:
    """Return the end of the last page (RFC 3533, 6)."""
    start = file.seek(max(0, size - 2 * _OGG_PAGE))
    tail = file.read()
    at = tail.rfind(b"OggS")
    if at < 0:
        return None
    page = tail[at:]
    segments = page[26] if len(page) > 26 else 0
    end = start + at + 27 + segments
    return end if end > size else end + sum(page[27 : 27 + segments])


def _mp3_end(file: BinaryIO) -> int | None:
    """Return the end according to the Xing header in the first frame, if there is one."""
    file.seek(0)
    head = file.read(10)
    start = 0
    if head[:3] == b"ID3" and len(head) == 10:
        start = 10 + sum((byte & 0x7F) << 7 * (3 - place) for place, byte in enumerate(head[6:]))
    file.seek(start)
    frame = file.read(192)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    if at < 0 or len(frame) < at + 16 or not frame[at + 7] & 0b10:
        return None
    place = at + 8 + 4 * (frame[at + 7] & 1)
    return start + int.from_bytes(frame[place : place + 4], "big") - _MP3_SLACK
