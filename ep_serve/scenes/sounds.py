"""Synthesize the audio of a scene."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ep_serve.scenes.scene import Scene, Sound

SAMPLE_RATE = 16_000
_FADE = 0.015
"""Seconds of fade-in and fade-out, which avoid clicks."""


def synthesize(scene: Scene) -> NDArray[np.float32]:
    """Synthesize the waveform (16000 * seconds,) of a scene, with peaks at 0.5."""
    wave = np.zeros(scene.seconds * SAMPLE_RATE, dtype=np.float32)
    for number, sound in enumerate(scene.sounds):
        rng = np.random.default_rng([scene.seed, 3, number])
        first = round(sound.start * SAMPLE_RATE)
        count = round((sound.end - sound.start) * SAMPLE_RATE)
        wave[first : first + count] = 0.5 * sound.loudness * _sound(sound, count, rng)
    return wave


def degrade(wave: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Degrade a waveform as microphones and codecs do: gain, noise, hum, low-pass."""
    degraded = wave.astype(np.float64)
    if rng.random() < 0.5:
        spectrum = np.fft.rfft(degraded)
        edge = rng.uniform(4500, 8000)
        hertz = np.fft.rfftfreq(len(degraded), 1 / SAMPLE_RATE)
        degraded = np.fft.irfft(spectrum / (1 + (hertz / edge) ** 8), len(degraded))
    if rng.random() < 0.6:
        degraded = degraded + rng.normal(0, 10 ** rng.uniform(-4.5, -2.3), len(degraded))
    if rng.random() < 0.2:
        time = np.arange(len(degraded)) / SAMPLE_RATE
        hum = np.sin(2 * np.pi * rng.choice([50, 60]) * time)
        degraded = degraded + 10 ** rng.uniform(-4, -2.5) * hum
    return (degraded * rng.uniform(0.15, 1.6)).clip(-1, 1).astype(np.float32)


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
    """Two alternating tones."""
    high = (time * rng.uniform(2.5, 4.0)) % 1 < 0.5
    hertz = 400 * 2**pitch * np.where(high, 1.5, 1.0)
    phase = _phase(hertz)
    return 0.8 * np.sin(phase) + 0.2 * np.sin(2 * phase)


def _clicks(
    time: NDArray[np.float64], pitch: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Short decaying pulses, six to eleven a second."""
    every = 1 / rng.uniform(6, 11)
    since = time % every
    knocks: NDArray[np.float64] = np.exp(-since * 450) * np.sin(
        2 * np.pi * (1200 + 1800 * pitch) * since
    )
    return knocks


def _noise(
    time: NDArray[np.float64], pitch: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Noise between low-passed and white."""
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
