"""Draw the frames of a scene."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ep_serve.scenes.scene import COLOURS, MOTIONS, PLACES, Scene, Sight

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) as shares of width and height."""

_ROLL = 16
"""Maximum shift in pixels of the noise, which differs in every frame."""
_TRAVEL = 0.28
"""Distance from the centre at which a moving shape starts and ends, as a share of the frame."""


def draw(scene: Scene, moments: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Draw a scene at the given times.

    Args:
        scene: The scene.
        moments: (T,) seconds.
        size: (width, height) in pixels.

    Returns:
        (T, height, width, 3) RGB.
    """
    background = _background(scene.seed, size)
    tints = _tints(scene)
    frames = np.repeat(background[None], len(moments), axis=0)
    for frame, moment in zip(frames, moments, strict=True):
        for sight, tint in zip(scene.sights, tints, strict=True):
            if sight.start <= moment < sight.end:
                _paint(frame, sight, moment, tint)
    return frames


def box(sight: Sight, moment: float, size: tuple[int, int]) -> Box:
    """Bounding box of a shape at a time."""
    x, y = _centre(sight, moment)
    across = sight.radius * min(size) / size[0]
    down = sight.radius * min(size) / size[1]
    return x - across, y - down, x + across, y + down


def degrade(frames: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Degrade frames (T, H, W, 3) as cameras and codecs do: light, blur, noise, compression.

    One choice holds for all frames of a clip. JPEG stands in for a video codec: the same transform,
    quantization and subsampled colour, at a hundredth of the cost.
    """
    gain = rng.uniform(0.9, 1.1, 3) if rng.random() < 0.5 else np.ones(3)
    gain = (gain * rng.uniform(0.8, 1.15)).astype(np.float32)
    height, width = frames.shape[1:3]
    grain = None
    if rng.random() < 0.4:
        shape = (height + _ROLL, width + _ROLL, 3)
        grain = rng.uniform(0, 10) * rng.standard_normal(shape, dtype=np.float32)
    blur = rng.uniform(0.2, 1.2) * height / 112 if rng.random() < 0.4 else 0.0
    quality = int(rng.integers(15, 95)) if rng.random() < 0.8 else None
    degraded = np.empty_like(frames)
    for number, frame in enumerate(frames):
        lit = frame * gain
        if grain is not None:
            y, x = rng.integers(_ROLL, size=2)
            lit += grain[y : y + height, x : x + width]
        picture = Image.fromarray(lit.clip(0, 255).astype(np.uint8))
        if blur:
            picture = picture.filter(ImageFilter.GaussianBlur(blur))
        if quality is not None:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=quality, subsampling=2)
            picture = Image.open(file)
        degraded[number] = np.asarray(picture)
    return degraded


def _background(seed: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Static background: a tint, a gradient and a soft pattern."""
    width, height = size
    rng = np.random.default_rng([seed, 1])
    tint = rng.uniform(25, 120) + rng.uniform(-14, 14, 3)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    slope = rng.uniform(-25, 25) * (x - 0.5) + rng.uniform(-25, 25) * (y - 0.5)
    waves = rng.uniform(0, 9) * np.sin(
        2 * np.pi * (rng.uniform(-6, 6) * x + rng.uniform(-6, 6) * y + rng.random())
    )
    grain = rng.normal(0, rng.uniform(0, 5), (height, width))
    dull: NDArray[np.float64] = tint + (slope + waves + grain)[..., None]
    return dull.clip(0, 255).astype(np.uint8)


def _tints(scene: Scene) -> list[NDArray[np.float32]]:
    """The colour of each sight: that of its name with random variation."""
    rng = np.random.default_rng([scene.seed, 2])
    return [
        (np.array(COLOURS[sight.colour]) + rng.uniform(-16, 16, 3)).clip(0, 255).astype(np.float32)
        for sight in scene.sights
    ]


def _centre(sight: Sight, moment: float) -> tuple[float, float]:
    if sight.motion is None:
        assert sight.place is not None
        return PLACES[sight.place]
    right, down = MOTIONS[sight.motion]
    along = (moment - sight.start) / (sight.end - sight.start)
    way = _TRAVEL * (2 * min(max(along, 0.0), 1.0) - 1)
    return 0.5 + right * way, 0.5 + down * way


def _paint(
    frame: NDArray[np.uint8], sight: Sight, moment: float, tint: NDArray[np.float32]
) -> None:
    """Draw a shape onto a frame (H, W, 3)."""
    height, width = frame.shape[:2]
    radius = sight.radius * min(width, height)
    x0, y0 = _centre(sight, moment)
    x0, y0 = x0 * width, y0 * height
    left, right = _reach(x0, radius, width)
    top, bottom = _reach(y0, radius, height)
    y, x = np.mgrid[top:bottom, left:right].astype(np.float32)
    distance = _distance(sight.shape, (x + 0.5 - x0) / radius, (y + 0.5 - y0) / radius)
    cover = (0.5 - distance * radius).clip(0, 1)[..., None]
    part = frame[top:bottom, left:right]
    part[:] = (part + cover * (tint - part) + 0.5).astype(np.uint8)


def _reach(middle: float, radius: float, size: int) -> tuple[int, int]:
    """The pixels that a shape may touch along one side of a picture."""
    return max(0, int(middle - radius) - 1), min(size, int(middle + radius) + 3)


def _distance(shape: str, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[Any]:
    """Roughly the distance to the outline of a shape of radius 1 around 0, negative inside it."""
    distance: NDArray[Any]
    if shape == "circle":
        distance = np.hypot(x, y) - 1
    elif shape == "ring":
        distance = abs(np.hypot(x, y) - 0.75) - 0.25
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.88
    elif shape == "cross":
        lying = np.maximum(abs(x) - 1, abs(y) - 0.32)
        standing = np.maximum(abs(y) - 1, abs(x) - 0.32)
        distance = np.minimum(lying, standing)
    else:
        assert shape == "triangle", shape
        distance = np.maximum(abs(x) * 0.894 - (y + 1) * 0.447, y - 0.85)
    return distance
