"""Sound as the audio tower wants it: one channel of float32 at 16 kHz."""

from __future__ import annotations

from collections.abc import Iterator

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.container import InputContainer
from numpy.typing import NDArray

from ep_serve.media.containers import check_complete, open_media, pick_stream, prepare_decoder
from ep_serve.media.counter import decodes
from ep_serve.media.errors import MediaError
from ep_serve.media.limits import Deadline, MediaLimits

SAMPLE_RATE = 16_000
"""Hz."""
SOURCE_RATES = (4_000, 384_000)
"""Hz; beyond these the resampler's filter, or the output of one packet, grows out of bounds."""
FULL_SCALE = 2.0**31
"""Float sound may exceed 1; beyond the range of 32-bit samples its power overflows float32."""
TOKEN_S = 0.04
"""Seconds of one audio token; tracks closer together than that start at the same time."""

# A filter twice as sharp as the default: flat to 7.3 kHz, more than 90 dB down above 8.2 kHz.
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
        stream = pick_stream(container.streams.audio)
        if stream is None:
            raise MediaError("the file has no sound track")
        prepare_decoder(stream, "sound", limits)
        track = _Track(limits, start_s)
        for frame in _frames(container, stream, deadline):
            track.add(frame)
        samples = track.finish()
    if not samples.size:
        return None
    peak = max(-float(samples.min()), float(samples.max()))
    if not peak <= FULL_SCALE:  # also true of "not a number"
        raise MediaError(f"the sound has samples of size {peak:g}; the limit is {FULL_SCALE:g}")
    return samples


def _frames(
    container: InputContainer, stream: AudioStream, deadline: Deadline
) -> Iterator[AudioFrame]:
    """Every frame of the stream, silence standing in for packets that are damaged."""
    packets = failed = 0
    for packet in container.demux(stream):
        packets += bool(packet.size)
        try:
            frames = packet.stream.decode(packet)
        except av.FFmpegError:
            failed += 1
            frames = []
        for frame in frames:
            deadline.check()
            yield frame
        deadline.check()
    check_complete(container, stream, "sound", packets)
    if failed and failed == packets:
        raise MediaError(f"the sound cannot be decoded ({stream.codec_context.name})")


class _Track:
    """Mixes, resamples and collects frames up to a limit."""

    def __init__(self, limits: MediaLimits, start_s: float | None) -> None:
        self._limits = limits
        self._start_s = start_s
        self._skip = 0
        self._length = 0
        self._parts: list[NDArray[np.float32]] = []
        self._resampler: AudioResampler | None = None
        self._shape: tuple[int, str, str] | None = None
