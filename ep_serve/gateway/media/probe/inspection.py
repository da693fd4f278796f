"""Inspect media files without decoding them; runs in the helper process.

It accepts the containers and codecs that the engine decodes. Frames and durations are measured from
the packets, because headers may be wrong.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import av
from av.container import InputContainer

from ep_serve.contract.media_formats import (
    AUDIO_CODECS,
    CONTAINERS,
    HEAD_BYTES,
    MAX_CHANNELS,
    MAX_STREAMS,
    SAMPLE_RATES,
    VIDEO_CODECS,
    default_track,
    unsupported_format,
    webp_size,
)
from ep_serve.contract.truncation import missing_bytes, missing_seconds

_PICTURE_CODECS = {
    "png_pipe": "png",
    "apng": "apng",
    "jpeg_pipe": "mjpeg",
    "webp_pipe": "webp",
    "bmp_pipe": "bmp",
    "gif": "gif",
    "gif_pipe": "gif",
}
"""FFmpeg's demuxers for `PICTURE_FORMATS`, and their codecs; AVIF files are read as MP4."""
_DEMUXERS = tuple(dict.fromkeys((*CONTAINERS, *_PICTURE_CODECS)))
_AVIF_BRANDS = ("avif", "avis")


@dataclass(frozen=True)
class Bounds:
    """Limits of media; see `settings.ProbeSettings`."""

    max_duration_s: float
    max_frames: int
    max_pixels: int
    max_aspect: float


class RefusedError(Exception):
    """A rejected medium; `status` is 415 or 422."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass
class MediaInfo:
    """Properties of a media file."""

    container: str
    picture: bool = False
    """Whether it is an image file."""
    video: str | None = None
    width: int = 0
    height: int = 0
    frames: int = 0
    audio: str | None = None
    sample_rate: int = 0
    duration_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def probe(file: BinaryIO, bounds: Bounds) -> MediaInfo:
    """Determine the properties of a file.

    Raises:
        RefusedError: the format is not supported or a limit is exceeded.
    """
    head = file.read(HEAD_BYTES)
    if name := unsupported_format(head):
        raise RefusedError(415, f"is in the format {name}, which is not served")
    lacking = missing_bytes(file)
    options = {"max_pixels": str(bounds.max_pixels), "threads": "1"}
    try:
        container = av.open(
            file,
            mode="r",
            options=options,
            container_options={
                "format_whitelist": ",".join(_DEMUXERS),
                "protocol_whitelist": "none",
            },
            metadata_errors="replace",
        )
    except (av.FFmpegError, ValueError, OSError):
        reason = "is not in a supported format, or its header is damaged"
        raise RefusedError(415, f"is cut short: {lacking}" if lacking else reason) from None
    try:
        with container:
            facts = _facts(container, bounds, webp_size(head))
    except (av.FFmpegError, ArithmeticError, LookupError, OSError, ValueError):
        raise RefusedError(422, "is damaged and cannot be read") from None
    if lacking:
        raise RefusedError(422, f"is cut short: {lacking}")
    return facts


def _facts(container: InputContainer, bounds: Bounds, canvas: tuple[int, int] | None) -> MediaInfo:
    if len(container.streams) > MAX_STREAMS:
        raise RefusedError(422, f"has {len(container.streams)} streams; the limit is {MAX_STREAMS}")
    facts = MediaInfo(container.format.name.split(",")[0])
    _video(container, facts, bounds, canvas)
    _audio(container, facts)
    if facts.video is None and facts.audio is None:
        raise RefusedError(415, "contains neither video nor audio that can be decoded")
    brand = str(container.metadata.get("major_brand", "")).strip()
    facts.picture = facts.video == _PICTURE_CODECS.get(facts.container, "") or (
        facts.container == "mov" and brand in _AVIF_BRANDS
    )
    if container.duration:
        _check_duration(container.duration / av.time_base, bounds)
    _count_packets(container, facts, bounds)
    return facts


def _video(
    container: InputContainer, facts: MediaInfo, bounds: Bounds, canvas: tuple[int, int] | None
) -> None:
    stream = default_track(container.streams.video)
    if stream is None:
        return
    codec: Any = stream.codec_context
    name = codec.name if codec is not None else "unknown"
    still = facts.container not in CONTAINERS
    if name not in (_PICTURE_CODECS.values() if still else VIDEO_CODECS):
        raise RefusedError(415, f"has video in the unsupported codec {name}")
    facts.video, facts.width, facts.height = name, codec.width, codec.height
    if name == "webp" and canvas is not None:
        facts.width, facts.height = canvas
    pixels = facts.width * facts.height
    size = f"{facts.width}x{facts.height}"
    if pixels <= 0:
        reason = f"has no picture size, or more than the limit of {bounds.max_pixels} pixels"
        raise RefusedError(422, reason)
    if pixels > bounds.max_pixels:
        raise RefusedError(
            422, f"has {size} = {pixels} pixels; the limit is {bounds.max_pixels} pixels"
        )
    aspect = max(facts.width, facts.height) / min(facts.width, facts.height)
    if aspect > bounds.max_aspect:
        raise RefusedError(
            422, f"is {size} pixels, {aspect:.0f} to 1; the limit is {bounds.max_aspect:g} to 1"
        )


def _audio(container: InputContainer, facts: MediaInfo) -> None:
    stream = default_track(container.streams.audio)
    if stream is None:
        return
    codec: Any = stream.codec_context
    name = codec.name if codec is not None else "unknown"
    if name not in AUDIO_CODECS:
        raise RefusedError(415, f"has audio in the unsupported codec {name}")
    low, high = SAMPLE_RATES
    if not low <= codec.sample_rate <= high:
        raise RefusedError(
            422, f"has {codec.sample_rate} samples a second; the limits are {low} and {high}"
        )
    if codec.channels > MAX_CHANNELS:
        raise RefusedError(422, f"has {codec.channels} channels; the limit is {MAX_CHANNELS}")
    facts.audio, facts.sample_rate = name, codec.sample_rate


def _count_packets(container: InputContainer, facts: MediaInfo, bounds: Bounds) -> None:
    """Measure the frames and the longest stream from the packets, up to the limits."""
    spans: dict[int, _Span] = {}
    reached = 0.0
    kinds = {stream.index: stream.type for stream in container.streams}
    for packet in container.demux():
        index = packet.stream_index
        kind = kinds.get(index)
        if not packet.size or kind not in ("video", "audio"):
            continue
        if kind == "video":
            facts.frames += 1
            if facts.frames > bounds.max_frames:
                raise RefusedError(422, f"has more pictures than the limit of {bounds.max_frames}")
        base = packet.time_base
        if base is None:
            continue
        length = float((packet.duration or 0) * base)
        span = spans.setdefault(index, _Span())
        span.add(None if packet.pts is None else float(packet.pts * base), length)
        facts.duration_s = max(facts.duration_s, span.seconds)
        reached = max(reached, span.last)
        _check_duration(span.seconds, bounds)
    if not facts.frames and not spans:
        raise RefusedError(422, "is empty: its streams have no packets")
    stated = (container.duration or 0) / av.time_base
    if reached and missing_seconds(container.format.name, stated, reached):
        raise RefusedError(
            422, f"is cut short: its header states {stated:.1f} s, the file holds {reached:.1f} s"
        )


class _Span:
    """The duration of a stream: the sum of its packet durations or their time span."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._sum = 0.0
        self._first = math.inf
        self.last = -math.inf

    def add(self, moment: float | None, length: float) -> None:
        self._sum += length
        if moment is not None:
            self._first = min(self._first, moment)
            self.last = max(self.last, moment + length)
        self.seconds = max(self._sum, self.last - self._first)


def _check_duration(seconds: float, bounds: Bounds) -> None:
    if seconds > bounds.max_duration_s:
        raise RefusedError(
            422, f"lasts {seconds:.1f} s or more; the limit is {bounds.max_duration_s:g} s"
        )
