"""Render scenes as decoded clips, without encoding them to files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ep_serve.media.sampling import SamplingRule, choose_frames
from ep_serve.preprocess.features import Bounds, shrunk
from ep_serve.scenes import pictures, sounds
from ep_serve.scenes.scene import Scene

SIZES = (
    *((112, 112), (168, 168), (224, 224), (196, 196)),
    *((160, 120), (240, 180), (224, 126), (192, 108), (120, 160)),
)
"""Widths and heights of training clips in pixels: square, 4:3, 16:9 and portrait."""
RATES = (8, 10, 12, 15, 24, 25, 30)
"""Frames a second."""
AAC_FRAME = 1024
"""Samples; the length of an AAC track is a multiple."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A decoded clip, two frames to each second.

    Attributes:
        frames: (T, H, W, 3) uint8.
        moments: (T,) times of the frames in seconds.
        fps: Rate of the sampled frames, as in the engine.
        sound: (n,) float32 at 16 kHz.
        size: (width, height) in pixels before frames were shrunk.
    """

    frames: NDArray[np.uint8]
    moments: NDArray[np.float64]
    fps: float
    sound: NDArray[np.float32]
    size: tuple[int, int]


def make_clip(scene: Scene, bounds: Bounds, *, degraded: bool = True) -> Clip:
    """Render a scene as the engine's decoder returns it from a recorded file.

    Args:
        scene: The scene to render.
        bounds: Least and most pixels of a frame; larger frames are shrunk as in the engine.
        degraded: Add degradations of cameras, microphones and codecs.
    """
    rng = np.random.default_rng([scene.seed, 4])
    size = SIZES[rng.integers(len(SIZES))]
    rate = int(rng.choice(RATES))
    choice = choose_frames(scene.seconds * rate, rate, SamplingRule())
    moments = choice.indices / rate
    frames = pictures.draw(scene, moments, size)
    wave = sounds.synthesize(scene)
    if degraded:
        frames = pictures.degrade(frames, rng)
        wave = sounds.degrade(wave, rng)
    padded = np.zeros(-(-len(wave) // AAC_FRAME) * AAC_FRAME, dtype=np.float32)
    padded[: len(wave)] = wave
    return Clip(_shrink(frames, bounds), moments, choice.fps, padded, size)


def _shrink(frames: NDArray[np.uint8], bounds: Bounds) -> NDArray[np.uint8]:
    _, height, width, _ = frames.shape
    height, width = shrunk(height, width, bounds)
    if (height, width) == frames.shape[1:3]:
        return frames
    return np.stack(
        [
            np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC))
            for f in frames
        ]
    )
