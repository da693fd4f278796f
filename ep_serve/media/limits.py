"""How much work and memory one file may cost."""

from __future__ import annotations

import time
from dataclasses import dataclass, fields

from ep_serve.media.errors import MediaError


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """Bounds on one file; what exceeds them is refused with a `MediaError`.

    Raises:
        ValueError: a limit that is not above zero.
    """

    max_duration_s: float = 1800.0
    """Seconds of picture or sound: 45,000 audio tokens, more than a prompt can hold."""
    max_sound_s: float = 1800.0
    """Seconds of sound that are decoded, of a file or of the sound track of a video."""
    max_pixels: int = 8192 * 4320
    """Pixels of one picture: the largest frame of common H.264, HEVC and AV1 levels."""
    max_aspect: float = 200.0
    """Long side over short side: image processors of the Qwen family refuse more."""
    max_frames: int = 216_000
    """Pictures in a video, sampled or not: half an hour at 120 a second."""
    max_clip_bytes: int = 2 * 1024**3
    """Bytes of the sampled pictures of a clip, held all at once as RGB."""
    timeout_s: float = 10.0
    """Wall-clock seconds for decoding one file, so that a crafted one cannot hold a thread."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name} must be above 0, got {value}")

    def check_picture(self, what: str, height: int, width: int) -> None:
        """Refuse a picture of (height, width) pixels that is empty, too large or too narrow."""
        if height <= 0 or width <= 0:
            raise MediaError(f"the {what} has no picture size ({width}x{height} pixels)")
        if height * width > self.max_pixels:
            raise MediaError(
                f"the {what} has {width}x{height} = {width * height} pixels; "
                f"the limit is {self.max_pixels} pixels"
            )
        aspect = max(height, width) / min(height, width)
        if aspect > self.max_aspect:
            raise MediaError(
                f"the {what} is {width}x{height} pixels, a ratio of {aspect:.0f} to 1; "
                f"the limit is {self.max_aspect:.0f} to 1"
            )

    def check_duration(self, what: str, seconds: float) -> None:
        """Refuse a `what` of more than `max_duration_s` seconds."""
        if seconds > self.max_duration_s:
            raise MediaError(
                f"the {what} lasts {seconds:.1f} s; the limit is {self.max_duration_s:g} s"
            )


class Deadline:
    """The moment by which one file must be decoded."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() > self._end

    def check(self) -> None:
        """Raise `MediaError` once the time is over."""
        if self.passed:
            raise MediaError(
                f"the file takes longer to decode than the limit of {self._seconds:g} s"
            )
