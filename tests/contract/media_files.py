"""Files in every format that can be written here, served or not."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import av
import numpy as np
from av.stream import Disposition
from PIL import Image

from tests.clips import make_clip, make_image, make_picture, make_sound

Make = Callable[[], bytes]

STILL: dict[str, Make] = {
    name: partial(make_image, fmt=name)
    for name in (
        *("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "TIFF", "JPEG2000", "MPO", "PPM", "ICO"),
        *("TGA", "PCX", "DDS", "SGI"),
    )
}


def animation(fmt: str) -> bytes:
    """Four pictures in a format of Pillow's."""
    file = io.BytesIO()
    first, *others = [Image.fromarray(make_picture(number)) for number in range(4)]
    first.save(file, fmt, save_all=True, append_images=others, duration=100)
    return file.getvalue()


def transparent(fmt: str) -> bytes:
    """A picture with an alpha channel."""
    file = io.BytesIO()
    Image.fromarray(make_picture(1)).convert("RGBA").save(file, fmt)
    return file.getvalue()


ANIMATED: dict[str, Make] = {
    **{f"animated {name}": partial(animation, name) for name in ("WEBP", "PNG", "GIF", "AVIF")},
    **{f"transparent {name}": partial(transparent, name) for name in ("WEBP", "PNG", "AVIF")},
    "animated TIFF": partial(animation, "TIFF"),
}


def clip(container: str, codec: str, sound: str | None, rate: int = 48_000) -> bytes:
    """A second of picture and sound in a container and codecs."""
    return make_clip(
        1,
        size=(176, 144),
        codec=codec,
        container=container,
        sound_rate=rate if sound else None,
        sound_codec=sound,
        pix_fmt="yuvj420p" if codec == "mjpeg" else None,
        fps=25 if codec in ("mpeg1video", "mpeg2video") else 8,
    )


def sound(container: str, codec: str, rate: int = 48_000, channels: int = 1) -> bytes:
    """A second of sound in a container and a codec."""
    return make_sound(1, rate, channels, codec=codec, container=container)


CLIPS: dict[str, Make] = {
    f"{container} {codec} {track}": partial(clip, container, codec, track)
    for container, codec, track in (
        ("mp4", "libx264", "aac"),
        ("mp4", "libx265", "ac3"),
        ("mp4", "libsvtav1", "libopus"),
        ("mov", "prores", "pcm_s16be"),
        ("mov", "mjpeg", "alac"),
        ("mov", "qtrle", None),
        ("3gp", "h263", "aac"),
        ("webm", "libvpx", "libopus"),
        ("webm", "libvpx-vp9", "libopus"),
        ("matroska", "ffv1", "flac"),
        ("mov", "png", "pcm_f32le"),
        ("matroska", "mpeg4", "eac3"),
        ("matroska", "libx264", "wavpack"),
        ("avi", "huffyuv", None),
        ("avi", "msmpeg4v2", None),
        ("avi", "mpeg4", "mp2"),
        ("avi", "rawvideo", "pcm_u8"),
        ("avi", "mjpeg", "libmp3lame"),
        ("mpegts", "mpeg2video", "mp2"),
        ("mpegts", "libx264", "aac"),
        ("mpeg", "mpeg1video", "mp2"),
        ("gif", "gif", None),
    )
} | {
    "flv flv mp3": lambda: clip("flv", "flv", "libmp3lame", 44_100),
    "flv flv nellymoser": lambda: clip("flv", "flv", "nellymoser", 44_100),
}

SOUNDS: dict[str, Make] = {
    f"{container} {codec}": partial(sound, container, codec)
    for container, codec in (
        *(("wav", f"pcm_{kind}") for kind in ("u8", "s16le", "s24le", "s32le", "f32le", "f64le")),
        *(("wav", f"pcm_{kind}") for kind in ("mulaw", "alaw")),
        *(("wav", "adpcm_ms"), ("wav", "adpcm_ima_wav"), ("wav", "g722")),
        *(("ogg", "libopus"), ("ogg", "flac"), ("flac", "flac"), ("mp3", "libmp3lame")),
        *(("adts", "aac"), ("mp4", "aac"), ("mp4", "alac"), ("matroska", "pcm_s24be")),
        *(("aiff", "pcm_s16be"), ("au", "pcm_s16be"), ("caf", "pcm_s16le"), ("w64", "pcm_s16le")),
        *(("ac3", "ac3"), ("tta", "tta"), ("wv", "wavpack")),
    )
} | {
    "amr": lambda: sound("amr", "libopencore_amrnb", 8_000),
    "wav 5.1": lambda: sound("wav", "pcm_s16le", 48_000, 6),
    "wav at 2 kHz": lambda: sound("wav", "pcm_s16le", 2_000),
    "wav of 100 channels": lambda: many_channels(100),
}


def many_channels(count: int) -> bytes:
    """A WAV file of silence in this many channels."""
    data = bytes(2 * count * 1_600)
    head = (1).to_bytes(2, "little") + count.to_bytes(2, "little")
    head += (16_000).to_bytes(4, "little") + (32_000 * count).to_bytes(4, "little")
    head += (2 * count).to_bytes(2, "little") + (16).to_bytes(2, "little")
    chunks = b"WAVEfmt " + len(head).to_bytes(4, "little") + head
    chunks += b"data" + len(data).to_bytes(4, "little") + data
    return b"RIFF" + len(chunks).to_bytes(4, "little") + chunks


def asf() -> bytes:
    """A second of picture and sound in ASF, as WMV files are."""
    file = io.BytesIO()
    with av.open(file, "w", format="asf") as output:
        video: Any = output.add_stream("wmv2", rate=8)
        video.width, video.height, video.pix_fmt = 112, 112, "yuv420p"
        for number in range(8):
            frame = av.VideoFrame.from_ndarray(make_picture(number), format="rgb24")
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
    return file.getvalue()


def tracks(container: str, *, flags: Sequence[bool], seconds: Sequence[float]) -> bytes:
    """A file of several sound tracks, of these lengths, some flagged as default."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        streams: list[Any] = []
        for flag in flags:
            stream: Any = output.add_stream("aac", rate=16_000)
            stream.codec_context.layout = "mono"
            stream.disposition = Disposition.default if flag else Disposition(0)
            streams.append(stream)
        for stream, length in zip(streams, seconds, strict=True):
            samples = np.zeros((1, round(16_000 * length)), np.float32)
            frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16_000, 0
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
    return file.getvalue()
