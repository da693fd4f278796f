"""Encode scenes as MP4 files with H.264 and AAC."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import OutputContainer

from ep_serve.scenes import pictures, sounds
from ep_serve.scenes.scene import Scene

_FRAMES_PER_BATCH = 32
"""Frames drawn at a time, to bound memory."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """Options of encoding a scene.

    Attributes:
        size: Width and height in pixels, even numbers.
        fps: Frames a second.
        crf: Video quality on libx264's scale, 0 (lossless) to 51.
        bit_rate: Audio bits a second.
        sample_rate: Audio samples a second.
        sound: False leaves the sound track out.
    """

    size: tuple[int, int] = (224, 224)
    fps: int = 25
    crf: int = 23
    bit_rate: int = 64_000
    sample_rate: int = 48_000
    sound: bool = True


def encode(scene: Scene, encoding: Encoding | None = None) -> bytes:
    """Encode a scene as MP4, deterministic in its arguments."""
    settings = encoding or Encoding()
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        video = output.add_stream("libx264", rate=settings.fps)
        video.width, video.height = settings.size
        video.pix_fmt = "yuv420p"
        # Macroblock-tree rate control is not deterministic.
        video.options = {
            "crf": str(settings.crf),
            "preset": "veryfast",
            "x264-params": "no-mbtree=1",
        }
        video.thread_count = 1
        audio = _sound_stream(output, settings) if settings.sound else None
        for number, picture in enumerate(_pictures(scene, settings)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, settings.fps)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        if audio is not None:
            _write_sound(output, audio, scene, settings)
    return file.getvalue()


def _pictures(scene: Scene, settings: Encoding) -> Iterator[np.ndarray]:
    moments = np.arange(scene.seconds * settings.fps) / settings.fps
    for first in range(0, len(moments), _FRAMES_PER_BATCH):
        yield from pictures.draw(scene, moments[first : first + _FRAMES_PER_BATCH], settings.size)


def _sound_stream(output: OutputContainer, settings: Encoding) -> AudioStream:
    stream = output.add_stream("aac", rate=settings.sample_rate)
    stream.codec_context.layout = "mono"
    stream.codec_context.bit_rate = settings.bit_rate
    stream.codec_context.thread_count = 1
    return stream


def _write_sound(
    output: OutputContainer, stream: AudioStream, scene: Scene, settings: Encoding
) -> None:
    whole = AudioFrame.from_ndarray(sounds.synthesize(scene)[None], format="flt", layout="mono")
    whole.sample_rate, whole.pts = sounds.SAMPLE_RATE, 0
    whole.time_base = Fraction(1, sounds.SAMPLE_RATE)
    resampler = AudioResampler("fltp", "mono", settings.sample_rate)
    for frame in [*resampler.resample(whole), *resampler.resample(None)]:
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))
