"""Small media files, made on the spot and the same every time.

Each frame of a clip carries its number as black and white cells along its top edge, so that a
test can tell with `read_number` which frames it was given, whatever the codec did to them.
"""

from __future__ import annotations

import io
import struct
import tempfile
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

_BITS = 8
_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1", 8: "7.1"}
_SOUND_CODECS = {"webm": "libopus", "ogg": "libopus", "wav": "pcm_s16le", "flac": "flac"}
_CLOCK = Fraction(1, 90_000)
_SAME_EVERY_TIME = {"libx264": {"x264-params": "no-mbtree=1"}}  # its rate control varies


def make_picture(
    number: int, size: tuple[int, int] = (112, 112), seed: int = 0
) -> NDArray[np.uint8]:
    """A picture of (width, height) that carries `number` modulo 256: (H, W, 3) uint8."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x * (1 + c) + y * (3 - c) + 7 * number + 31 * seed) / 17) for c in range(3)]
    picture = (128 + 90 * np.stack(waves, -1)).astype(np.uint8)
    for bit in range(_BITS):
        cells = slice(bit * width // _BITS, (bit + 1) * width // _BITS)
        picture[: height // 4, cells] = 255 * (number >> bit & 1)
    return picture


def read_number(picture: NDArray[np.uint8]) -> int:
    """The number that `make_picture` put into a picture (H, W, 3) of any size."""
    height, width = picture.shape[:2]
    row = picture[height // 8].mean(-1)
    return sum(int(row[(2 * bit + 1) * width // (2 * _BITS)] > 127) << bit for bit in range(_BITS))


def make_tone(seconds: float, rate: int, channels: int = 1) -> NDArray[np.float32]:
    """A chirp in each channel, each softer than the one before: (channels, n) float32."""
    t = np.arange(round(seconds * rate)) / rate
    chirp = 0.5 * np.sin(2 * np.pi * (220 * t + 60 * t * t))
    return np.stack([chirp / (1 + c) for c in range(channels)]).astype(np.float32)


def make_clip(
    seconds: float = 4,
    fps: int = 8,
    size: tuple[int, int] = (112, 112),
    sound_rate: int | None = 16_000,
    sound_seconds: float | None = None,
    codec: str = "libx264",
    container: str = "mp4",
    seed: int = 0,
    channels: int = 1,
    *,
    rotation: float | None = None,
    mirrored: bool = False,
    times: Sequence[float] | None = None,
    pix_fmt: str | None = None,
    sound_codec: str | None = None,
    sound_start: float = 0.0,
    options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
) -> bytes:
    """A video file.

    Args:
        seconds: length of the picture; with `times`, their number counts instead.
        fps: frames a second.
        size: (width, height) in pixels.
        sound_rate: Hz; None for no sound track.
        sound_seconds: length of the sound, that of the picture by default; 0 for an empty track.
        codec: encoder of the picture.
        container: FFmpeg's name of the container.
        seed: another seed gives another picture.
        channels: 1, 2, 6 (5.1) or 8 (7.1).
        rotation: degrees counterclockwise by which a player turns the picture.
        mirrored: True if a player mirrors the picture, left to right, before it turns it.
        times: when each frame is shown, in seconds, for a variable frame rate.
        pix_fmt: of the encoded picture; yuv420p by default, if the encoder has it.
        sound_codec: encoder of the sound; by default one that suits the container.
        sound_start: time of the first sample in seconds.
        options: of the container; `movflags=faststart` puts an MP4's header before its data.
        codec_options: of the encoder of the picture.
    """
    shown = [i / fps for i in range(round(seconds * fps))] if times is None else times
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip"  # not in memory: faststart opens the file a second time
        flags = {"fflags": "+bitexact", **(options or {})}  # no dates, no random identifiers
        with av.open(str(path), "w", format=container, options=flags) as output:
            video = cast(VideoStream, output.add_stream(codec, rate=fps))
            video.width, video.height = size
            video.pix_fmt = pix_fmt or _pixel_format(video)
            video.codec_context.time_base = Fraction(1, fps) if times is None else _CLOCK
            video.options = {**_SAME_EVERY_TIME.get(codec, {}), **(codec_options or {})}
            video.thread_count = 1
            if rotation is not None or mirrored:
                video.set_display_rotation(rotation or 0.0, hflip=mirrored)
            audio = None
            if sound_rate is not None:
                audio = _sound_stream(output, container, sound_codec, sound_rate, channels)
            _write_picture(output, video, shown, size, seed)
            if audio is not None:
                length = len(shown) / fps if sound_seconds is None else sound_seconds
                assert sound_rate is not None
                tone = make_tone(length, sound_rate, channels)
                _write_sound(output, audio, tone, sound_rate, sound_start)
        return path.read_bytes()


def make_sound(
    seconds: float = 1,
    rate: int = 16_000,
    channels: int = 1,
    codec: str | None = None,
    container: str = "wav",
    tone: NDArray[np.float32] | None = None,
) -> bytes:
    """A sound file of `seconds`, or of a given `tone` (channels, n) float32."""
    file = io.BytesIO()
    with av.open(file, "w", format=container, options={"fflags": "+bitexact"}) as output:
        stream = _sound_stream(output, container, codec, rate, channels)
        output.start_encoding()  # a sound without samples has a header too
        samples = make_tone(seconds, rate, channels) if tone is None else tone
        _write_sound(output, stream, samples, rate, 0.0)
    return file.getvalue()


def make_wav(seconds: float = 1, rate: int = 16_000, channels: int = 1) -> bytes:
    """A WAV file of 16-bit samples."""
    return make_sound(seconds, rate, channels)


def make_image(
    width: int = 140, height: int = 112, fmt: str = "PNG", number: int = 1, **save: Any
) -> bytes:
    """A picture file in a format that Pillow writes; `save` goes to its writer."""
    file = io.BytesIO()
    Image.fromarray(make_picture(number, (width, height))).save(file, fmt, **save)
    return file.getvalue()


def make_png_header(width: int, height: int) -> bytes:
    """A PNG file that promises (width, height) pixels and holds none."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def make_changing_clip(sizes: Sequence[tuple[int, int]], fps: int = 8) -> bytes:
    """A Motion JPEG clip in Matroska whose frames have these (width, height)."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska", options={"fflags": "+bitexact"}) as output:
        stream = output.add_stream("mjpeg", rate=fps)
        stream.width, stream.height = sizes[0]
        stream.pix_fmt = "yuvj420p"
        for number, size in enumerate(sizes):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height = size
            encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, fps)
            frame = av.VideoFrame.from_ndarray(make_picture(number, size), format="rgb24")
            for packet in [*encoder.encode(frame), *encoder.encode(None)]:
                packet.pts = packet.dts = number
                packet.time_base, packet.stream = Fraction(1, fps), stream
                output.mux(packet)
    return file.getvalue()


def _pixel_format(stream: VideoStream) -> str:
    formats = [f.name for f in stream.codec_context.codec.video_formats or []]
    return "yuv420p" if "yuv420p" in formats or not formats else formats[0]


def _sound_stream(
    output: OutputContainer, container: str, codec: str | None, rate: int, channels: int
) -> AudioStream:
    name = codec or _SOUND_CODECS.get(container, "aac")
    stream = cast(AudioStream, output.add_stream(name, rate=rate))
    stream.codec_context.layout = _LAYOUTS[channels]
    stream.codec_context.thread_count = 1
    return stream


def _write_picture(
    output: OutputContainer,
    stream: VideoStream,
    shown: Sequence[float],
    size: tuple[int, int],
    seed: int,
) -> None:
    unit = stream.codec_context.time_base
    for number, time in enumerate(shown):
        frame = av.VideoFrame.from_ndarray(make_picture(number, size, seed), format="rgb24")
        frame.pts, frame.time_base = round(time / unit), unit
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def _write_sound(
    output: OutputContainer,
    stream: AudioStream,
    tone: NDArray[np.float32],
    rate: int,
    start: float,
) -> None:
    if not tone.size:
        return
    layout = _LAYOUTS[len(tone)]
    interleaved = np.ascontiguousarray(tone.T).reshape(1, -1)  # planes end at eight channels
    frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
    frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
    frame.pts = round(start * rate)
    output.mux(stream.encode(frame))
    output.mux(stream.encode(None))
