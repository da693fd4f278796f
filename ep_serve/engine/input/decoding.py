"""Decoding the media of requests inside the limits of the server.

A medium is measured before it is decoded: its packets and its header tell how many tokens it will
become and how much memory that takes. Files may lie about both; decoding stops at the limits too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from vllm.multimodal.audio import AudioResampler

from ep_serve import media
from ep_serve.contract.request_options import TOKEN_PIXELS
from ep_serve.engine.input.medium import DecodedMedium, EncodedMedium, Medium
from ep_serve.layout import audio_token_count
from ep_serve.preprocess.features import (
    SAMPLE_RATE,
    TEMPORAL_PATCH,
    Bounds,
    frame_size,
    shrunk,
)

if TYPE_CHECKING:
    from ep_serve.engine.settings import MediaOptions, Settings

MEL_FRAMES_PER_SECOND = 100
SOUND_SLACK_S = 0.25
"""Seconds by which decoded sound may be shorter than its packets: encoder delay and padding."""

DECODER_BYTES_PER_PIXEL = 40
"""Of a video's own frames: what a decoder keeps for reference, and conversions to RGB."""
FRAME_BYTES_PER_PIXEL = 20
"""Of each sampled frame, once resized: the frame, its patches as bytes and their values."""
PICTURE_BYTES_PER_PIXEL = (26, 45)
"""Of a picture's own pixels while it is decoded, and of the resized ones while they are cut."""
UNDERSTATED, UNDERSTATED_S = 2, 10.0
"""How many times what they state files may need, and how many seconds more of sound.

Beyond that they are refused: nothing waited for the memory that they take.
"""

SOUND_BYTES_PER_SECOND = SAMPLE_RATE * 4 * 4
"""Samples in float32, once more with padding, and their log-mel spectrum."""


@dataclass(frozen=True)
class Measure:
    """The cost of a medium, estimated from its header and packets."""

    tokens: int
    """Audio, video and image tokens, or a little less."""
    nbytes: int
    """Memory for decoding it and computing its features."""
    sound_s: float = 0.0
    """Seconds of sound; 0 if unknown."""
    plan: media.ClipPlan | None = None


class Decoder:
    """Measures and decodes media. Thread-safe; errors are `MediaError`s."""

    def __init__(self, settings: Settings) -> None:
        self._max_frames = settings.media.max_frames
        self._max_tokens = settings.max_full_tokens
        self._limits = media.MediaLimits(
            max_duration_s=settings.engine.max_media_seconds,
            max_sound_s=self._max_tokens / audio_token_count(MEL_FRAMES_PER_SECOND) + 1,
            max_clip_bytes=min(
                media.MediaLimits().max_clip_bytes,
                self._max_tokens * TEMPORAL_PATCH * TOKEN_PIXELS * 3,
            ),
            timeout_s=settings.engine.decode_timeout_s,
        )

    def measure(self, medium: Medium, options: MediaOptions, bounds: Bounds) -> Measure:
        """Find out what a medium costs, without decoding it.

        Raises:
            MediaError: it cannot be read, or exceeds a limit.
        """
        if medium.modality == "audio":
            return self._sound_measure(self._seconds(medium))
        if medium.modality == "image":
            height, width = self._image_size(medium)
            return _image_measure(height, width, bounds)
        if isinstance(medium, DecodedMedium):
            frames, height, width = medium.array.shape[:3]
            return _video_measure(frames, height, width, bounds)
        plan = media.plan_clip(medium.data, self._rule(options), self._limits)
        picture = _video_measure(len(plan.moments), plan.height, plan.width, bounds)
        if not (options.sound and plan.has_sound):
            return replace(picture, plan=plan)
        sound = self._sound_measure(plan.sound_s)
        tokens, nbytes = picture.tokens + sound.tokens, picture.nbytes + sound.nbytes
        return Measure(tokens, nbytes, sound.sound_s, plan)

    def decode(
        self, medium: Medium, options: MediaOptions, bounds: Bounds, measure: Measure
    ) -> media.Clip | np.ndarray:
        """Decode a medium whose cost was measured.

        Returns:
            A clip, (n,) float32 sound at 16 kHz, or an image (H, W, 3) uint8.

        Raises:
            MediaError: it cannot be read, exceeds a limit, or needs much more memory than measured.
        """
        if medium.modality == "video":
            return self._clip(medium, options, bounds, measure)
        return (
            self._waveform(medium, measure) if medium.modality == "audio" else self._picture(medium)
        )

    def _clip(
        self, medium: Medium, options: MediaOptions, bounds: Bounds, measure: Measure
    ) -> media.Clip:
        """The frames of a video, which shrink as they are decoded, and its sound."""
        if isinstance(medium, DecodedMedium):
            frames = _even(medium.array)
            return media.Clip(
                frames=frames, fps=medium.rate, sound=None, duration_s=len(frames) / medium.rate
            )
        plan = measure.plan
        assert plan is not None, "a file was measured"

        def size(height: int, width: int) -> tuple[int, int]:
            self._check_frames(len(plan.moments), height, width, bounds, measure)
            return shrunk(height, width, bounds)

        return media.decode_clip(
            medium.data,
            self._rule(options),
            self._limits_of(measure),
            sound=options.sound,
            size=size,
            plan=plan,
        )

    def _waveform(self, medium: Medium, measure: Measure) -> np.ndarray:
        if isinstance(medium, EncodedMedium):
            return media.decode_sound(medium.data, self._limits_of(measure))
        if medium.rate == SAMPLE_RATE:
            return medium.array
        resampler = AudioResampler(target_sr=SAMPLE_RATE)
        return np.asarray(resampler.resample(medium.array, orig_sr=medium.rate), dtype=np.float32)

    def _picture(self, medium: Medium) -> np.ndarray:
        if isinstance(medium, EncodedMedium):
            return media.decode_image(medium.data, self._limits)
        return medium.array

    def _check_frames(
        self, count: int, height: int, width: int, bounds: Bounds, measure: Measure
    ) -> None:
        """Refuse frames that are much larger than the header states, or too many tokens."""
        real = _video_measure(count, height, width, bounds)
        if real.nbytes > UNDERSTATED * measure.nbytes or real.tokens > self._max_tokens:
            raise media.MediaError(
                f"the frames of the video have {width}x{height} pixels, more than its header states"
            )

    def _limits_of(self, measure: Measure) -> media.MediaLimits:
        """The limits for a file of which no more is decoded than was measured, or a little more."""
        if not measure.sound_s:
            return self._limits
        measured = UNDERSTATED * measure.sound_s + UNDERSTATED_S
        return replace(self._limits, max_sound_s=min(self._limits.max_sound_s, measured))

    def _rule(self, options: MediaOptions) -> media.SamplingRule:
        return media.SamplingRule(fps=options.fps, max_frames=self._max_frames)

    def _seconds(self, medium: Medium) -> float:
        if isinstance(medium, EncodedMedium):
            return media.sound_seconds(medium.data, self._limits)
        return len(medium.array) / medium.rate

    def _sound_measure(self, seconds: float) -> Measure:
        heard = max(0.0, seconds - SOUND_SLACK_S)
        tokens = audio_token_count(int(heard * MEL_FRAMES_PER_SECOND))
        longest = seconds or self._limits.max_sound_s
        return Measure(tokens, int(longest * SOUND_BYTES_PER_SECOND), seconds)

    def _image_size(self, medium: Medium) -> tuple[int, int]:
        if isinstance(medium, EncodedMedium):
            return media.image_size(medium.data, self._limits)
        height, width = medium.array.shape[:2]
        return height, width


def _image_measure(height: int, width: int, bounds: Bounds) -> Measure:
    pixels = _resized_pixels(height, width, bounds)
    decoding, cutting = PICTURE_BYTES_PER_PIXEL
    return Measure(pixels // TOKEN_PIXELS, max(height * width * decoding, pixels * cutting))


def _video_measure(frames: int, height: int, width: int, bounds: Bounds) -> Measure:
    pixels = _resized_pixels(height, width, bounds)
    tokens = -(-frames // TEMPORAL_PATCH) * (pixels // TOKEN_PIXELS)
    decoding = height * width * DECODER_BYTES_PER_PIXEL
    return Measure(tokens, decoding + frames * pixels * FRAME_BYTES_PER_PIXEL)


def _resized_pixels(height: int, width: int, bounds: Bounds) -> int:
    resized = frame_size(height, width, bounds)
    return resized[0] * resized[1]


def _even(frames: np.ndarray) -> np.ndarray:
    """An even number of frames: two make one temporal patch, the last one may repeat."""
    return frames if len(frames) % 2 == 0 else np.concatenate([frames, frames[-1:]])
