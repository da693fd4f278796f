"""Decoding audio to what the audio tower expects: mono float32 at 16 kHz.

Samples are placed by their timestamps, so that a track that starts late, pauses or has lost a
packet stays on the clock of the picture. A mono float track at 16 kHz without gaps comes out
exactly as its decoder made it.
"""

from __future__ import annotations

from collections.abc import Iterator

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from ep_serve.contract.media_formats import MAX_CHANNELS, SAMPLE_RATES, default_track
from ep_serve.media.containers import (
    UNTIMED,
    PacketSpan,
    check_complete,
    open_media,
    prepare_decoder,
)
from ep_serve.media.counter import decodes
from ep_serve.media.errors import MediaError
from ep_serve.media.limits import Deadline, MediaLimits

SAMPLE_RATE = 16_000
"""Hz."""
FULL_SCALE = 2.0**31
"""Float sound may exceed 1; beyond the range of 32-bit samples its power overflows float32."""
GAP_S = 0.1
"""Seconds; timestamps that leave a smaller gap are taken as rounding or encoder delay."""

# A filter twice as sharp as the default: flat to 7 kHz, more than 90 dB down above 8.2 kHz.
# Channels are weighted so that their sum cannot exceed full scale: stereo becomes the mean.
_RESAMPLER = {"filter_size": "128", "cutoff": "0.95", "rematrix_maxval": "1.0"}


def decode_sound(data: bytes, limits: MediaLimits) -> NDArray[np.float32]:
    """Decode a sound file, or the sound track of a video: (n,) float32 mono at 16 kHz.

    Sound that is mono float at 16 kHz already is passed on unchanged.

    Raises:
        MediaError: the file cannot be read, holds no sound, or exceeds a limit.
    """
    samples = sound_track(data, limits, Deadline(limits.timeout_s))
    if samples is None:
        raise MediaError("the sound is empty (0 samples)")
    return samples


def sound_seconds(data: bytes, limits: MediaLimits) -> float:
    """How many seconds of sound the packets of a file add up to, without decoding.

    Raises:
        MediaError: the file cannot be read, holds no sound, or exceeds a limit.
    """
    deadline = Deadline(limits.timeout_s)
    with open_media(data, "sound", limits, deadline) as container:
        stream = _audio_stream(container, limits)
        span = PacketSpan(stream)
        for packet in container.demux(stream):
            deadline.check()
            span.add(packet)
            limits.check_duration("sound", span.seconds())
        return span.seconds()


def sound_track(
    data: bytes, limits: MediaLimits, deadline: Deadline, *, start_s: float | None = None
) -> NDArray[np.float32] | None:
    """The first or default sound track of a file, (n,) float32 mono at 16 kHz; None if empty.

    With `start_s`, the time of the first picture on the file's clock, the sound is made to begin
    there: silence is put before a later track, the head of an earlier one is cut.

    Raises:
        MediaError: as `decode_sound`.
    """
    decodes.add("audio")
    with open_media(data, "sound", limits, deadline) as container:
        stream = _audio_stream(container, limits)
        track = _Track(limits, start_s)
        timed = container.format.name not in UNTIMED
        for frame in _frames(data, container, stream, deadline):
            track.add(frame, timed)
        samples = track.finish()
    if not samples.size:
        return None
    peak = max(-float(samples.min()), float(samples.max()))
    if not peak <= FULL_SCALE:  # also true of "not a number"
        raise MediaError(f"the sound has samples of size {peak:g}; the limit is {FULL_SCALE:g}")
    return samples


def _audio_stream(container: InputContainer, limits: MediaLimits) -> AudioStream:
    stream = default_track(container.streams.audio)
    if stream is None:
        raise MediaError("the file has no sound track")
    prepare_decoder(stream, "sound", limits)
    if stream.codec_context.channels > MAX_CHANNELS:
        raise MediaError(
            f"the sound has {stream.codec_context.channels} channels; the limit is {MAX_CHANNELS}"
        )
    return stream


def _frames(
    data: bytes, container: InputContainer, stream: AudioStream, deadline: Deadline
) -> Iterator[AudioFrame]:
    """Every frame that can be decoded; a damaged packet leaves a gap in time."""
    packets = failed = 0
    span = PacketSpan(stream)
    for packet in container.demux(stream):
        packets += bool(packet.size)
        span.add(packet)
        try:
            frames = packet.stream.decode(packet)
        except av.FFmpegError:
            failed += 1
            frames = []
        for frame in frames:
            deadline.check()
            yield frame
        deadline.check()
    # The duration in the header is that of the longest stream.
    end_s = span.end_s if len(container.streams) == 1 else 0.0
    check_complete(data, container, stream, "sound", packets, end_s)
    if failed and failed >= packets:
        raise MediaError(f"the sound cannot be decoded ({stream.codec_context.name})")


class _Track:
    """Mixes and resamples frames, and puts them where their timestamps say, up to a limit."""

    def __init__(self, limits: MediaLimits, start_s: float | None) -> None:
        self._max_s = min(limits.max_duration_s, limits.max_sound_s)
        self._origin = start_s
        self._position = 0  # samples after the origin; negative before it
        self._parts: list[NDArray[np.float32]] = []
        self._resampler: AudioResampler | None = None
        self._shape: tuple[int, str, str] | None = None

    def add(self, frame: AudioFrame, timed: bool) -> None:
        shape = frame.sample_rate, frame.format.name, frame.layout.name
        if shape != self._shape or self._resampler is None:
            self._flush()
            low, high = SAMPLE_RATES
            if not low <= frame.sample_rate <= high:
                raise MediaError(
                    f"the sound has {frame.sample_rate} samples a second; "
                    f"the limits are {low} and {high}"
                )
            self._shape = shape
            self._resampler = AudioResampler("fltp", "mono", SAMPLE_RATE, options=_RESAMPLER)
        if timed and frame.pts is not None and frame.time_base is not None:
            self._align(float(frame.pts * frame.time_base))
        self._collect(self._resampler.resample(frame))

    def finish(self) -> NDArray[np.float32]:
        """All samples, (n,) float32."""
        self._flush()
        return np.concatenate(self._parts) if self._parts else np.empty(0, np.float32)

    def _align(self, time_s: float) -> None:
        """Fill the gap between what was collected and a frame of this time."""
        if self._origin is None:
            self._origin = time_s - self._position / SAMPLE_RATE
        if not self._parts and self._position == 0:
            early = round((time_s - self._origin) * SAMPLE_RATE)
            self._position = early if early < -GAP_S * SAMPLE_RATE else 0
        missing = round((time_s - self._origin) * SAMPLE_RATE) - self._position
        if missing > GAP_S * SAMPLE_RATE:
            self._check(self._position + missing)
            self._append(np.zeros(missing, np.float32))

    def _flush(self) -> None:
        if self._resampler is not None:
            self._collect(self._resampler.resample(None))

    def _collect(self, frames: list[AudioFrame]) -> None:
        for frame in frames:
            self._append(frame.to_ndarray()[0].astype(np.float32, copy=False))

    def _append(self, samples: NDArray[np.float32]) -> None:
        kept = samples[max(0, -self._position) :]
        self._position += len(samples)
        self._check(self._position)
        if kept.size:
            self._parts.append(kept)

    def _check(self, position: int) -> None:
        if position > self._max_s * SAMPLE_RATE:
            raise MediaError(f"the sound lasts longer than the limit of {self._max_s:g} s")
