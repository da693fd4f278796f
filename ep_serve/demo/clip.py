"""A clip with sound, made on the spot: H.264 and AAC in an MP4 file, the same every time."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np

FPS = 8
SOUND_RATE = 16_000
SIZE = 224
"""Width and height in pixels."""


def make_clip(seconds: int = 12) -> bytes:
    """A square wanders over a still background; a beep sounds in every third second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        video = output.add_stream("libx264", rate=FPS)
        video.width = video.height = SIZE
        video.pix_fmt = "yuv420p"
        video.thread_count = 1
        audio = output.add_stream("aac", rate=SOUND_RATE, layout="mono")
        for index in range(seconds * FPS):
            picture = av.VideoFrame.from_ndarray(_picture(index), format="rgb24")
            picture.pts, picture.time_base = index, Fraction(1, FPS)
            output.mux(video.encode(picture))
        output.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(_sound(seconds), format="flt", layout="mono")
        sound.sample_rate, sound.pts = SOUND_RATE, 0
        output.mux(audio.encode(sound))
        output.mux(audio.encode(None))
    return file.getvalue()


def _picture(index: int) -> np.ndarray:
    picture = np.full((SIZE, SIZE, 3), 200, dtype=np.uint8)
    left = (index * 5) % (SIZE - 48)
    picture[88:136, left : left + 48] = (210, 40, 40)
    return picture


def _sound(seconds: int) -> np.ndarray:
    time = np.arange(seconds * SOUND_RATE) / SOUND_RATE
    tone = 0.4 * np.sin(2 * np.pi * 880 * time)
    return np.where(time.astype(int) % 3 == 1, tone, 0)[None].astype(np.float32)
