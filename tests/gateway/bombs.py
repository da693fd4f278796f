"""Files of few bytes that want much: hours of sound, pictures without end."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import av
import numpy as np

_SILENCE = b"\x1b\x02"
"""An Opus packet of two empty SILK frames of 60 ms: 120 ms in two bytes (RFC 6716, 3.2)."""
_SAMPLES = 5_760
"""What it decodes to, at 48 kHz."""
_PER_PAGE = 255


def opus_bomb(nbytes: int, *, honest: bool = False) -> bytes:
    """An Ogg file of packets of two bytes, each of which decodes to 120 ms of silence.

    Args:
        nbytes: about the size of the file.
        honest: whether its pages tell how much time passes; otherwise they say none does.
    """
    pages = [
        _page(2, 0, 0, [b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 0, 48_000, 0, 0)]),
        _page(0, 0, 1, [b"OpusTags" + struct.pack("<I", 0) + struct.pack("<I", 0)]),
    ]
    blank = _page(0, 0, 0, [_SILENCE] * _PER_PAGE, crc=False)
    # A checksum that begins with zero is linear: that of each page is that of the blank one and
    # those of the bits that differ. Computing it anew for 25 MB would take most of a minute.
    checksum = _ogg_crc(blank)
    position = [_bit_checksums(blank, 6 + byte) for byte in range(8)]
    number_at = [_bit_checksums(blank, 18 + byte) for byte in range(4)]
    for number in range(2, 2 + nbytes // len(blank)):
        granule = (number - 1) * _PER_PAGE * _SAMPLES if honest else 0
        crc = checksum
        for table, value in ((position, granule), (number_at, number)):
            for byte, sums in zip(value.to_bytes(len(table), "little"), table, strict=True):
                crc ^= sums[byte]
        head = struct.pack("<QIII", granule, 1, number, crc)
        pages.append(blank[:6] + head + blank[26:])
    return b"".join(pages)


def _page(kind: int, granule: int, number: int, packets: list[bytes], *, crc: bool = True) -> bytes:
    table = bytes(len(packet) for packet in packets)
    head = struct.pack("<4sBBqIII", b"OggS", 0, kind, granule, 1, number, 0)
    body = head + bytes([len(table)]) + table + b"".join(packets)
    return body[:22] + struct.pack("<I", _ogg_crc(body)) + body[26:] if crc else body


_CRC = [0] * 256
for _i in range(256):
    _r = _i << 24
    for _ in range(8):
        _r = (_r << 1) ^ 0x04C11DB7 if _r & 0x80000000 else _r << 1
    _CRC[_i] = _r & 0xFFFFFFFF


def _ogg_crc(data: bytes) -> int:
    value = 0
    for byte in data:
        value = ((value << 8) & 0xFFFFFFFF) ^ _CRC[(value >> 24) ^ byte]
    return value


def _bit_checksums(page: bytes, place: int) -> list[int]:
    """What each value of the byte at a place adds to the checksum of a page that has 0 there."""
    sums = [0] * 256
    after = bytes(len(page) - place - 1)
    for bit in range(8):
        alone = _ogg_crc(bytes([1 << bit]) + after)
        for value in range(256):
            if value >> bit & 1:
                sums[value] ^= alone
    return sums


def flac_bomb(seconds: int) -> bytes:
    """Digital silence, which FLAC shrinks a thousandfold."""
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as output:
        stream: Any = output.add_stream("flac", rate=192_000)
        stream.layout = "7.1"
        samples = np.zeros((1, 192_000 * 8), np.int16)
        for second in range(seconds):
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="7.1")
            frame.sample_rate, frame.pts = 192_000, second * 192_000
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


def png_bomb(width: int, height: int, nbytes: int = 0) -> bytes:
    """A PNG of few bytes, or of `nbytes`, and many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = rows * max(1, nbytes // len(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def gif_bomb(nbytes: int) -> bytes:
    """A moving picture of 8192x4320 pixels, of which each frame changes one and takes 23 bytes."""
    head = b"GIF89a" + struct.pack("<HHBBB", 8_192, 4_320, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    control = b"\x21\xf9\x04\x00\x02\x00\x00\x00"
    frame = control + b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return head + frame * (nbytes // len(frame)) + b"\x3b"


def avi_bomb(nbytes: int, frames_a_second: int) -> bytes:
    """A film of 8192x4320 pixels whose pictures take two bytes each and repeat the one before."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return kind + struct.pack("<I", len(data)) + data

    picture = chunk(b"00dc", b"\0\0")
    count = nbytes // len(picture)
    width, height = 8_192, 4_320
    moment = 1_000_000 // frames_a_second
    main = struct.pack("<14I", moment, 0, 0, 0, count, 0, 1, 0, width, height, 0, 0, 0, 0)
    stream = b"vidsMJPG" + struct.pack("<10I", 0, 0, 0, 1, frames_a_second, 0, count, 0, 0, 0)
    image = struct.pack("<IiiHH4sIiiII", 40, width, height, 1, 24, b"MJPG", 0, 0, 0, 0, 0)
    lists = chunk(b"strh", stream + bytes(8)) + chunk(b"strf", image)
    header = chunk(b"LIST", b"hdrl" + chunk(b"avih", main) + chunk(b"LIST", b"strl" + lists))
    return chunk(b"RIFF", b"AVI " + header + chunk(b"LIST", b"movi" + picture * count))
