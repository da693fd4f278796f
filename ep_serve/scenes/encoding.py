"""Scenes as real files: H.264 and AAC in MP4, as a camera or an editor would write them."""

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

_AT_ONCE = 32
"""Frames drawn at once, so that memory does not grow with the clip."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a scene becomes a file.

    Attributes:
        size: Width and height in pixels, even numbers.
        fps: Frames a second.
        crf: Quality of the picture in libx264's scale, 0 (lossless) to 51.
        bit_rate: Of the sound, in bits a second.
        sample_rate: Of the sound, in Hz.
        sound: False leaves the sound track out.
    """

    size: tuple[int, int] = (224, 224)
    fps: int = 25
    crf: int = 23
    bit_rate: int = 64_000
    sample_rate: int = 48_000
    sound: bool = True


def encode(scene: Scene, encoding: Encoding | None = None) -> bytes:
    """Write a scene as an MP4 file; the same arguments give the same picture and sound."""
    how = encoding or Encoding()
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        video = output.add_stream("libx264", rate=how.fps)
        video.width, video.height = how.size
        video.pix_fmt = "yuv420p"
        # The rate control that looks at whole trees of blocks does not repeat itself exactly.
        video.options = {"crf": str(how.crf), "preset": "veryfast", "x264-params": "no-mbtree=1"}
        video.thread_count = 1
        audio = _sound_stream(output, how) if how.sound else None
        for number, picture in enumerate(_pictures(scene, how)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, how.fps)
            output.mux(video.encode(frame))
        output.mux(video.encode(None))
        if audio is not None:
            _write_sound(output, audio, scene, how)
    return file.getvalue()


def _pictures(scene: Scene, how: Encoding) -> Iterator[np.ndarray]:
    moments = np.arange(scene.seconds * how.fps) / how.fps
    for first in range(0, len(moments), _AT_ONCE):
        yield from pictures.draw(scene, moments[first : first + _AT_ONCE], how.size)


def _sound_stream(output: OutputContainer, how: Encoding) -> AudioStream:
    stream = output.add_stream("aac", rate=how.sample_rate)
    stream.codec_context.layout = "mono"
    stream.codec_context.bit_rate = how.bit_rate
    stream.codec_context.thread_count = 1
    return stream


def _write_sound(output: OutputContainer, stream: AudioStream, scene: Scene, how: Encoding) -> None:
    whole = AudioFrame.from_ndarray(sounds.play(scene)[None], format="flt", layout="mono")
    whole.sample_rate, whole.pts = sounds.SAMPLE_RATE, 0
    whole.time_base = Fraction(1, sounds.SAMPLE_RATE)
    resampler = AudioResampler("fltp", "mono", how.sample_rate)
    for frame in [*resampler.resample(whole), *resampler.resample(None)]:
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))
