"""What a media file is, found without decoding it. Runs in the helper process.

Containers and codecs are the ones the engine decodes. Packets are counted, not believed: what a
header says about its length is checked against what the file holds.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.stream import Disposition

PICTURES = frozenset(
    {"png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "gif", "gif_pipe", "mov"}
)
DEMUXERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "gif"),
    *("ogg", "wav", "mp3", "flac", "aac"),
    *("png_pipe", "jpeg_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe", "gif_pipe"),
)
VIDEO_CODECS = frozenset(
    {
        *("h264", "hevc", "libdav1d", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video"),
        *("h263", "flv", "mjpeg", "gif", "theora", "prores", "ffv1", "png", "rawvideo"),
    }
)
PICTURE_CODECS = frozenset({"png", "mjpeg", "webp", "bmp", "tiff", "gif", "av1", "libdav1d"})
AUDIO_CODECS = frozenset(
    {
        *("aac", "aac_latm", "mp3", "mp3float", "mp2", "mp2float", "opus", "vorbis", "flac"),
        *("alac", "ac3", "eac3", "amrnb", "amrwb", "speex", "adpcm_ms", "adpcm_ima_wav"),
        *("pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le"),
        *("pcm_s32be", "pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_mulaw", "pcm_alaw"),
    }
)
SAMPLE_RATES = (4_000, 384_000)
MAX_CHANNELS = 64
MAX_STREAMS = 64


@dataclass(frozen=True)
class Bounds:
    """The limits in force; see `settings.ProbeSettings`."""

    max_duration_s: float
    max_frames: int
    max_pixels: int
    max_aspect: float


class RefusedError(Exception):
    """A medium that is not served; `status` is 415 or 422."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


@dataclass
class Facts:
    """What is known about a medium."""

    container: str
    picture: bool = False
    """Whether it can serve as an image."""
    video: str | None = None
    width: int = 0
    height: int = 0
    frames: int = 0
    audio: str | None = None
    sample_rate: int = 0
    duration_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def probe(file: BinaryIO, bounds: Bounds) -> Facts:
    """Find out what a file is.

    Raises:
        RefusedError: it is not served, or exceeds a limit.
    """
    options = {"max_pixels": str(bounds.max_pixels), "threads": "1"}
    try:
        container = av.open(
            file,
            mode="r",
            options=options,
            container_options={
                "format_whitelist": ",".join(DEMUXERS),
                "protocol_whitelist": "none",
            },
            metadata_errors="replace",
        )
    except (av.FFmpegError, ValueError, OSError):
        raise RefusedError(
            415, "is not in a format that is served, or its header is damaged"
        ) from None
    try:
        with container:
            return _facts(container, bounds)
    except (av.FFmpegError, ArithmeticError, LookupError, OSError, ValueError):
        raise RefusedError(422, "is damaged and cannot be read") from None


def _facts(container: InputContainer, bounds: Bounds) -> Facts:
    if len(container.streams) > MAX_STREAMS:
        raise RefusedError(422, f"has {len(container.streams)} streams; the limit is {MAX_STREAMS}")
    facts = Facts(container.format.name.split(",")[0])
    _video(container, facts, bounds)
    _audio(container, facts)
    if facts.video is None and facts.audio is None:
        raise RefusedError(415, "holds neither a picture nor a sound that can be decoded")
    brand = str(container.metadata.get("major_brand", "")).strip()
    still = facts.container != "mov" or brand in ("avif", "avis")
    facts.picture = facts.container in PICTURES and facts.video in PICTURE_CODECS and still
    if container.duration:
        _check_duration(container.duration / av.time_base, bounds)
    _walk(container, facts, bounds)
    return facts


def _video(container: InputContainer, facts: Facts, bounds: Bounds) -> None:
    real = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not real:
        return
    codec: Any = real[0].codec_context
    name = codec.name if codec is not None else "unknown"
    if name not in VIDEO_CODECS | PICTURE_CODECS:
        raise RefusedError(415, f"has pictures in the codec {name}, which is not served")
    facts.video, facts.width, facts.height = name, codec.width, codec.height
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


def _audio(container: InputContainer, facts: Facts) -> None:
    if not container.streams.audio:
        return
    codec: Any = container.streams.audio[0].codec_context
    name = codec.name if codec is not None else "unknown"
    if name not in AUDIO_CODECS:
        raise RefusedError(415, f"has sound in the codec {name}, which is not served")
    low, high = SAMPLE_RATES
    if not low <= codec.sample_rate <= high:
        raise RefusedError(
            422, f"has {codec.sample_rate} samples a second; the limits are {low} and {high}"
        )
    if codec.channels > MAX_CHANNELS:
        raise RefusedError(422, f"has {codec.channels} channels; the limit is {MAX_CHANNELS}")
    facts.audio, facts.sample_rate = name, codec.sample_rate


def _walk(container: InputContainer, facts: Facts, bounds: Bounds) -> None:
    """Count frames and seconds of the longest stream; stop at the limits."""
    spans: dict[int, _Span] = {}
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
        _check_duration(span.seconds, bounds)
    if not facts.frames and not spans:
        raise RefusedError(422, "is empty: its streams hold nothing")


class _Span:
    """How long a stream plays: what its packets add up to, or how far they reach."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._sum = 0.0
        self._first = math.inf
        self._last = -math.inf

    def add(self, moment: float | None, length: float) -> None:
        self._sum += length
        if moment is not None:
            self._first = min(self._first, moment)
            self._last = max(self._last, moment + length)
        self.seconds = max(self._sum, self._last - self._first)


def _check_duration(seconds: float, bounds: Bounds) -> None:
    if seconds > bounds.max_duration_s:
        raise RefusedError(
            422, f"lasts {seconds:.1f} s or more; the limit is {bounds.max_duration_s:g} s"
        )
