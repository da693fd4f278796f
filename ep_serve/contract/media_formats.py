"""Supported containers, codecs and image formats, by their names in FFmpeg and Pillow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

CONTAINERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "gif"),
    *("ogg", "wav", "mp3", "flac", "aac"),
)
"""FFmpeg's demuxers for video and audio files; none of them opens other files."""
VIDEO_CODECS = (
    *("h264", "hevc", "libdav1d", "av1", "vp8", "vp9", "mpeg4", "mpeg2video", "mpeg1video"),
    *("h263", "flv", "mjpeg", "gif", "theora", "prores", "ffv1", "png", "rawvideo"),
)
AUDIO_CODECS = (
    *("aac", "aac_latm", "mp3", "mp3float", "mp2", "mp2float", "opus", "vorbis", "flac", "alac"),
    *("ac3", "eac3", "amrnb", "amrwb", "speex", "adpcm_ms", "adpcm_ima_wav"),
    *("pcm_u8", "pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_s32be"),
    *("pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_mulaw", "pcm_alaw"),
)
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
"""Pillow's formats; an animation is reduced to its first frame."""
SAMPLE_RATES = (4_000, 384_000)
"""Hz; outside these bounds the resampler's filter, or the output of one packet, is too large."""
MAX_CHANNELS = 64
MAX_STREAMS = 64

_DEFAULT, _ATTACHED_PICTURE = 0x1, 0x400
"""FFmpeg's dispositions (AV_DISPOSITION_*)."""

_UNSUPPORTED: dict[str, tuple[tuple[int, bytes], ...]] = {
    "ASF (WMV, WMA)": ((0, bytes.fromhex("3026b2758e66cf11")),),
    "RealMedia": ((0, b".RMF"),),
    "AIFF": ((8, b"AIFF"), (8, b"AIFC")),
    "AU": ((0, b".snd"),),
    "CAF": ((0, b"caff"),),
    "AMR": ((0, b"#!AMR"),),
    "Wave64": ((0, bytes.fromhex("726966662e91cf11")),),
    "TIFF": ((0, b"II*\0"), (0, b"MM\0*"), (0, b"II+\0"), (0, b"MM\0+")),
    "HEIC": ((4, b"ftypheic"), (4, b"ftypheix"), (4, b"ftyphevc"), (4, b"ftyphevx")),
    "JPEG 2000": ((4, b"jP  \r\n\x87\n"), (0, b"\xff\x4f\xff\x51")),
    "JPEG XL": ((4, b"JXL \r\n\x87\n"), (0, b"\xff\x0a")),
    "PSD": ((0, b"8BPS"),),
}
"""Common unsupported formats, with offset and value of their magic numbers."""

HEAD_BYTES = 64
"""Bytes of a file that are needed to detect its format."""


class Track(Protocol):
    """A PyAV stream."""

    @property
    def disposition(self) -> int:
        """FFmpeg's flags."""


_T = TypeVar("_T", bound=Track)


def default_track(tracks: Iterable[_T]) -> _T | None:
    """Return the first track with the default flag, else the first one.

    Attached pictures, such as cover art, do not count as video tracks.
    """
    real = [t for t in tracks if not t.disposition & _ATTACHED_PICTURE]
    flagged = (t for t in real if t.disposition & _DEFAULT)
    return next(flagged, real[0] if real else None)


def unsupported_format(head: bytes) -> str | None:
    """Return the name of a common unsupported format from the first bytes of a file, or None."""
    for name, marks in _UNSUPPORTED.items():
        if any(head[place : place + len(mark)] == mark for place, mark in marks):
            return name
    return None


def webp_size(head: bytes) -> tuple[int, int] | None:
    """Return (width, height) of an extended WebP file, or None.

    Animated WebP files are extended; FFmpeg does not report their size.
    """
    if head[:4] != b"RIFF" or head[8:16] != b"WEBPVP8X" or len(head) < 30:
        return None
    width, height = (int.from_bytes(head[at : at + 3], "little") + 1 for at in (24, 27))
    return width, height
