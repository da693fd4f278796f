"""Playing a scene: its waveform."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_serve.scenes.scene import Scene, Sound

SAMPLE_RATE = 16_000
_FADE = 0.015
"""Seconds in which a sound comes and goes, so that its borders do not click."""


def play(scene: Scene) -> NDArray[np.float32]:
    """(16000 * seconds,) the scene's sounds in silence, peaks at 0.5."""
    wave = np.zeros(scene.seconds * SAMPLE_RATE, dtype=np.float32)
    for number, sound in enumerate(scene.sounds):
        rng = np.random.default_rng([scene.seed, 3, number])
        first = round(sound.start * SAMPLE_RATE)
        count = round((sound.end - sound.start) * SAMPLE_RATE)
        wave[first : first + count] = 0.5 * sound.loudness * _sound(sound, count, rng)
    return wave


def worsen(wave: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """What microphones and codecs do to sound: loudness, hiss, hum, and less treble."""
    worse = wave.astype(np.float64)
    if rng.random() < 0.5:
        spectrum = np.fft.rfft(worse)
        edge = rng.uniform(4500, 8000)
        hertz = np.fft.rfftfreq(len(worse), 1 / SAMPLE_RATE)
        worse = np.fft.irfft(spectrum / (1 + (hertz / edge) ** 8), len(worse))
    if rng.random() < 0.6:
        worse = worse + rng.normal(0, 10 ** rng.uniform(-4.5, -2.3), len(worse))
    if rng.random() < 0.2:
        time = np.arange(len(worse)) / SAMPLE_RATE
        hum = np.sin(2 * np.pi * rng.choice([50, 60]) * time)
        worse = worse + 10 ** rng.uniform(-4, -2.5) * hum
    return (worse * rng.uniform(0.15, 1.6)).clip(-1, 1).astype(np.float32)


def _sound(sound: Sound, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    time = np.arange(count) / SAMPLE_RATE
    wave = _WAVES[sound.name](time, sound.pitch, rng)
    fade = np.minimum(time, time[::-1]) / _FADE
    faded: NDArray[np.float64] = wave * fade.clip(0, 1)
    return faded


def _phase(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    return 2 * np.pi * np.cumsum(hertz) / SAMPLE_RATE


def _beep(time: NDArray[np.float64], pitch: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """One steady tone."""
    return np.sin(2 * np.pi * 450 * 4**pitch * time + rng.uniform(0, 6))


def _chirp(
    time: NDArray[np.float64], pitch: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A tone that rises over three octaves, again and again."""
    along = (time * rng.uniform(1.6, 2.6)) % 1
    return np.sin(_phase(300 * 2**pitch * 8**along))


def _siren(
    time: NDArray[np.float64], pitch: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Two tones by turns."""
    high = (time * rng.uniform(2.5, 4.0)) % 1 < 0.5
    hertz = 400 * 2**pitch * np.where(high, 1.5, 1.0)
    phase = _phase(hertz)
    return 0.8 * np.sin(phase) + 0.2 * np.sin(2 * phase)


def _clicks(
    time: NDArray[np.float64], pitch: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Short knocks, six to eleven a second."""
    every = 1 / rng.uniform(6, 11)
    since = time % every
    knocks: NDArray[np.float64] = np.exp(-since * 450) * np.sin(
        2 * np.pi * (1200 + 1800 * pitch) * since
    )
    return knocks


def _noise(
    time: NDArray[np.float64], pitch: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """A hiss that holds all frequencies, more or less of the low ones."""
    white = rng.normal(0, 0.3, len(time))
    smooth = np.convolve(white, np.ones(4) / 4, "same")
    return ((1 - pitch) * 1.5 * smooth + pitch * white).clip(-1, 1)


def _buzz(time: NDArray[np.float64], pitch: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """A low saw-tooth."""
    hertz = 70 * 2**pitch
    return 0.9 * (2 * ((time * hertz + rng.random()) % 1) - 1)


_WAVES = {
    "beep": _beep,
    "chirp": _chirp,
    "siren": _siren,
    "clicks": _clicks,
    "noise": _noise,
    "buzz": _buzz,
}
