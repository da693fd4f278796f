"""Generate clips with sound from a seed: moving textures and chords in H.264 and AAC.

Video and audio differ for every seed, so that no server cache, whatever its key, matches two
clips.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray

SOUND_RATE = 16_000
CELLS = 14
"""Coloured cells along each side of the background."""
TOKEN_SIDE = 28


@dataclass(frozen=True, slots=True)
class ClipShape:
    """Common properties of the clips of a run."""

    seconds: float = 30.0
    width: int = 336
    height: int = 336
    fps: int = 8
    sound: bool = True

    def __post_init__(self) -> None:
        for name in ("seconds", "width", "height", "fps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.width % 2 or self.height % 2:
            raise ValueError(f"width and height must be even, got {self.width} x {self.height}")

    @property
    def frame_tokens(self) -> int:
        """Tokens of one pair of frames if the server does not resize them."""
        return (self.width // TOKEN_SIDE) * (self.height // TOKEN_SIDE)


def make_clip(shape: ClipShape, seed: int) -> bytes:
    """Generate an MP4 file, deterministic in its arguments."""
    rng = np.random.default_rng([seed, 0xC11])
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as output:
        video = output.add_stream("libx264", rate=shape.fps)
        video.width, video.height, video.pix_fmt = shape.width, shape.height, "yuv420p"
        video.options = {"preset": "ultrafast"}
        video.thread_count = 1
        audio = None
        if shape.sound:
            audio = output.add_stream("aac", rate=SOUND_RATE, layout="mono")
        _write_picture(output, video, shape, rng)
        if audio is not None:
            frame = av.AudioFrame.from_ndarray(_chords(shape.seconds, rng), "flt", layout="mono")
            frame.sample_rate, frame.pts = SOUND_RATE, 0
            output.mux(audio.encode(frame))
            output.mux(audio.encode(None))
    return file.getvalue()


def _write_picture(
    output: av.container.OutputContainer,
    stream: VideoStream,
    shape: ClipShape,
    rng: np.random.Generator,
) -> None:
    background = _background(shape, rng)
    dx, dy = rng.integers(-6, 7, 2)
    colour = rng.integers(0, 256, 3, dtype=np.uint8)
    side = min(shape.width, shape.height) // 5
    for index in range(max(1, round(shape.seconds * shape.fps))):
        picture = np.roll(background, (index * dy, index * dx), axis=(0, 1))
        left = (index * 5) % (shape.width - side)
        top = (index * 3) % (shape.height - side)
        picture[top : top + side, left : left + side] = colour
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = index, Fraction(1, shape.fps)
        output.mux(stream.encode(frame))
    output.mux(stream.encode(None))


def _background(shape: ClipShape, rng: np.random.Generator) -> NDArray[np.uint8]:
    cells = rng.integers(0, 256, (CELLS, CELLS, 3), dtype=np.uint8)
    rows = np.arange(shape.height) * CELLS // shape.height
    columns = np.arange(shape.width) * CELLS // shape.width
    return np.ascontiguousarray(cells[rows][:, columns])


def _chords(seconds: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """A different chord every second: (1, samples)."""
    time = np.arange(round(seconds * SOUND_RATE)) / SOUND_RATE
    tones = rng.uniform(110, 1760, (int(seconds) + 1, 3))
    pitches = tones[time.astype(int)]
    wave: NDArray[np.float64] = 0.2 * np.sin(2 * np.pi * pitches * time[:, None]).sum(axis=1)
    return wave.astype(np.float32)[None]
