"""Opening untrusted files with FFmpeg.

FFmpeg reads more than 300 formats, among them playlists that make it open other files and
addresses. Only containers that hold their own data and codecs in common use are let in here, no
protocol is, and every read stops at a deadline.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import av
from av.container import InputContainer
from av.packet import Packet
from av.stream import Stream

from ep_serve.contract.media_formats import (
    AUDIO_CODECS,
    CONTAINERS,
    HEAD_BYTES,
    MAX_STREAMS,
    VIDEO_CODECS,
    unsupported_format,
)
from ep_serve.contract.truncation import missing_bytes, missing_seconds
from ep_serve.media.errors import MediaError
from ep_serve.media.limits import Deadline, MediaLimits

CODECS = (*VIDEO_CODECS, *AUDIO_CODECS)
GUESSED_DURATION = ("mp3", "aac", "mpeg", "mpegts")
"""Demuxers whose duration is an estimate from the bit rate or from the last timestamp."""
UNTIMED = ("avi",)
"""Demuxers without presentation times, whose timestamps FFmpeg guesses."""

_DAMAGE = (av.FFmpegError, ArithmeticError, LookupError, OSError, RuntimeError, ValueError)


class Source(io.BytesIO):
    """The bytes of a file, which end at the deadline.

    An exception cannot travel through FFmpeg reliably, an early end of file can.
    """

    def __init__(self, data: bytes, deadline: Deadline) -> None:
        super().__init__(data)
        self._deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        return b"" if self._deadline.passed else super().read(size)


@contextmanager
def open_media(
    data: bytes, what: str, limits: MediaLimits, deadline: Deadline
) -> Iterator[InputContainer]:
    """Open the container in `data` and close it at the end of the block.

    Whatever FFmpeg raises within the block becomes a `MediaError` about the `what`.
    """
    if not data:
        raise MediaError(f"the {what} is empty (0 bytes)")
    check_format(data, what)
    unknown = (
        f"the {what} is not in a container that is served ({', '.join(CONTAINERS)}), "
        "or its header is missing, cut short or damaged"
    )
    if lacking := missing_bytes(io.BytesIO(data)):
        unknown = f"the {what} is cut short: {lacking}"
    with _damage_as(unknown, deadline):
        container = av.open(
            Source(data, deadline),
            mode="r",
            # FFmpeg decodes the first pictures while it opens a file: the bounds hold there too.
            options=_codec_options(limits),
            container_options={
                "format_whitelist": ",".join(CONTAINERS),
                "codec_whitelist": ",".join(CODECS),
                "protocol_whitelist": "none",
            },
            metadata_errors="replace",
        )
    with container, _damage_as(f"the {what} is damaged and cannot be read", deadline):
        deadline.check()
        if len(container.streams) > MAX_STREAMS:
            raise MediaError(
                f"the {what} has {len(container.streams)} streams; the limit is {MAX_STREAMS}"
            )
        if container.duration and container.format.name not in GUESSED_DURATION:
            limits.check_duration(what, container.duration / av.time_base)
        yield container


def prepare_decoder(stream: Stream, what: str, limits: MediaLimits) -> None:
    """Bound the decoder of `stream`, or refuse its codec.

    One thread: FFmpeg's own threads can wait for the interpreter lock while Python waits for
    them, and a server decodes several files side by side anyway.
    """
    codec: Any = stream.codec_context  # None where FFmpeg has no decoder
    if codec is None or codec.name not in CODECS:
        name = "unknown" if codec is None else codec.name
        raise MediaError(f"the {what} uses the codec {name}, which is not served")
    codec.options = _codec_options(limits)
    codec.thread_type = "NONE"
    codec.thread_count = 1


def check_format(data: bytes, what: str) -> None:
    """Refuse a common format that is not served by its name."""
    if name := unsupported_format(data[:HEAD_BYTES]):
        raise MediaError(f"the {what} is in the format {name}, which is not served")


def check_complete(
    data: bytes, container: InputContainer, stream: Stream, what: str, packets: int, end_s: float
) -> None:
    """Refuse a file that ends before its index, its stated duration or its structure.

    Args:
        data: the file.
        container: the same, opened.
        stream: one that was read to its end.
        what: the file, in words.
        packets: how many the stream had.
        end_s: when the last packet that was read ends; 0 if that is unknown.
    """
    # Only the index of MP4 and its relatives lists every packet.
    promised = len(stream.index_entries) if "mp4" in container.format.name else 0
    if packets < promised:
        raise MediaError(
            f"the {what} is cut short: its index lists {promised} packets, the file holds {packets}"
        )
    stated = (container.duration or 0) / av.time_base
    if end_s and missing_seconds(container.format.name, stated, end_s):
        raise MediaError(
            f"the {what} is cut short: its header states {stated:.1f} s, "
            f"the file holds {end_s:.1f} s"
        )
    if lacking := missing_bytes(io.BytesIO(data)):
        raise MediaError(f"the {what} is cut short: {lacking}")
    if container.format.name == "gif" and not data.rstrip(b"\0").endswith(b";"):
        raise MediaError(f"the {what} is cut short: it lacks the mark at the end of a GIF")


class PacketSpan:
    """How many seconds the packets of a stream add up to; of no stream, 0."""

    def __init__(self, stream: Stream | None) -> None:
        self._index = None if stream is None else stream.index
        self._sum = 0.0
        self._first: float | None = None
        self._end = 0.0

    def add(self, packet: Packet[Any]) -> None:
        if packet.stream_index != self._index or not packet.size or packet.is_discard:
            return
        if packet.time_base is None:
            return
        length = float((packet.duration or 0) * packet.time_base)
        self._sum += length
        if packet.pts is not None:
            begin = float(packet.pts * packet.time_base)
            self._first = begin if self._first is None else min(self._first, begin)
            self._end = max(self._end, begin + length)

    @property
    def end_s(self) -> float:
        """When the last packet ends; 0 without timestamps."""
        return self._end

    def seconds(self, start_s: float | None = None) -> float:
        """Seconds from `start_s`, if given, to the end of the last packet.

        Without it, the sum of all packets or the time that they span, whichever is longer.
        """
        if self._first is None:
            return self._sum
        if start_s is not None:
            return max(0.0, self._end - start_s)
        return max(self._sum, self._end - self._first)


@contextmanager
def _damage_as(sentence: str, deadline: Deadline) -> Iterator[None]:
    try:
        yield
    except MediaError:
        raise
    except _DAMAGE as error:
        deadline.check()
        raise MediaError(sentence) from error


def _codec_options(limits: MediaLimits) -> dict[str, str]:
    return {"max_pixels": str(limits.max_pixels), "threads": "1"}
