from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from ep_serve.media import MediaError, MediaLimits, decode_sound
from tests.clips import make_clip, make_sound, make_tone, make_wav

LIMITS = MediaLimits()


def _sine(frequency: float, rate: int, seconds: float = 1.0) -> NDArray[np.float32]:
    t = np.arange(round(seconds * rate)) / rate
    return (0.5 * np.sin(2 * np.pi * frequency * t)).astype(np.float32)[None]


def test_sound_at_16_khz_keeps_its_samples() -> None:
    tone = make_tone(1, 16_000)
    sound = decode_sound(make_sound(codec="pcm_f32le", tone=tone), LIMITS)
    np.testing.assert_array_equal(sound, tone[0])


def test_sound_is_one_dimensional_float32() -> None:
    sound = decode_sound(make_wav(0.5, 44_100, 2), LIMITS)
    assert sound.ndim == 1
    assert sound.dtype == np.float32


@pytest.mark.parametrize(
    ("container", "codec", "rate"),
    [
        ("wav", "pcm_s16le", 44_100),
        ("wav", "pcm_f32le", 8_000),
        ("flac", "flac", 48_000),
        ("ogg", "libopus", 48_000),
        ("ogg", "flac", 16_000),
        ("mp3", "libmp3lame", 44_100),
        ("adts", "aac", 16_000),
        ("mp4", "aac", 48_000),
        ("webm", "libopus", 48_000),
        ("matroska", "ac3", 48_000),
    ],
)
def test_every_container_of_sound_is_served(container: str, codec: str, rate: int) -> None:
    sound = decode_sound(make_sound(2, rate, codec=codec, container=container), LIMITS)
    assert len(sound) / 16_000 == pytest.approx(2.0, abs=0.15)
    loudness = float(np.sqrt(np.square(sound).mean()))
    assert loudness == pytest.approx(0.5 / np.sqrt(2), abs=0.03)


def test_the_sound_of_a_video_can_be_read_alone() -> None:
    assert len(decode_sound(make_clip(sound_seconds=2), LIMITS)) > 30_000


def test_stereo_becomes_the_mean_of_its_channels() -> None:
    tone = np.concatenate([_sine(440, 16_000), 0 * _sine(440, 16_000)])
    sound = decode_sound(make_sound(codec="pcm_f32le", channels=2, tone=tone), LIMITS)
    np.testing.assert_allclose(sound, tone.mean(0), atol=1e-6)


@pytest.mark.parametrize("channels", [6, 8])
def test_surround_sound_is_mixed_without_exceeding_full_scale(channels: int) -> None:
    tone = np.repeat(2 * _sine(440, 16_000), channels, axis=0)
    sound = decode_sound(make_sound(codec="pcm_f32le", channels=channels, tone=tone), LIMITS)
    assert np.abs(sound).max() == pytest.approx(1.0, abs=1e-3)


def test_the_centre_of_surround_sound_weighs_more_than_its_back() -> None:
    weights = []
    for channel in (2, 4):  # centre, back left
        tone = np.zeros((6, 16_000), np.float32)
        tone[channel] = _sine(440, 16_000)
        sound = decode_sound(make_sound(codec="pcm_f32le", channels=6, tone=tone), LIMITS)
        weights.append(np.abs(sound).max())
    assert weights[0] == pytest.approx(2 * weights[1], rel=1e-3)


def test_what_16_khz_can_hold_passes_the_resampler_unchanged() -> None:
    sound = decode_sound(
        make_sound(codec="pcm_f32le", rate=48_000, tone=_sine(6_000, 48_000)), LIMITS
    )
    np.testing.assert_allclose(sound[1000:-1000], _sine(6_000, 16_000)[0][1000:-1000], atol=1e-3)


def test_what_16_khz_cannot_hold_does_not_fold_back() -> None:
    sound = decode_sound(
        make_sound(codec="pcm_f32le", rate=48_000, tone=_sine(8_500, 48_000)), LIMITS
    )
    assert np.abs(sound[1000:-1000]).max() < 1e-4


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_the_length(rate: int) -> None:
    assert abs(len(decode_sound(make_wav(1.5, rate), LIMITS)) - 24_000) <= 1


@pytest.mark.parametrize(
    "data",
    [make_wav(0), make_clip(sound_seconds=0, container="matroska")],
    ids=["wav", "track of a video"],
)
def test_sound_without_samples_is_refused_as_empty(data: bytes) -> None:
    with pytest.raises(MediaError, match=r"^the sound is empty \(0 samples\)$"):
        decode_sound(data, LIMITS)


def test_sound_that_is_not_a_number_is_refused() -> None:
    tone = make_tone(1, 16_000)
    tone[0, 5000] = np.nan
    with pytest.raises(MediaError, match="samples of size nan"):
        decode_sound(make_sound(codec="pcm_f32le", tone=tone), LIMITS)


def test_sound_beyond_full_scale_is_refused() -> None:
    with pytest.raises(MediaError, match="samples of size"):
        decode_sound(make_sound(codec="pcm_f32le", tone=1e20 * make_tone(1, 16_000)), LIMITS)


@pytest.mark.parametrize("rate", [1_000, 500_000])
def test_a_sample_rate_out_of_bounds_is_refused(rate: int) -> None:
    with pytest.raises(MediaError, match=f"{rate} samples a second; the limits are 4000 and"):
        decode_sound(make_wav(0.1, rate), LIMITS)


def test_long_sound_is_refused_from_its_header() -> None:
    with pytest.raises(MediaError, match=r"the sound lasts 3.0 s; the limit is 2 s"):
        decode_sound(make_wav(3), MediaLimits(max_duration_s=2))


def test_long_sound_without_a_length_in_its_header_is_stopped_at_the_limit() -> None:
    endless = make_sound(3, container="adts", codec="aac")
    with pytest.raises(MediaError, match="the sound lasts longer than the limit of 2 s"):
        decode_sound(endless, MediaLimits(max_duration_s=2))


def test_a_gap_in_the_timestamps_is_filled_with_silence() -> None:
    data = bytearray(make_sound(3, container="adts", codec="aac"))
    whole = decode_sound(bytes(data), LIMITS)
    data = bytearray(make_sound(3, container="mpegts", codec="aac"))
    packets = [data[i : i + 188] for i in range(0, len(data), 188)]
    third = len(packets) // 3
    kept = b"".join(packets[:third] + packets[2 * third :])
    assert len(decode_sound(kept, LIMITS)) == pytest.approx(len(whole), abs=4800)
