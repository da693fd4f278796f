"""A medium of a request, before the processor has seen it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Modality = Literal["video", "audio", "image"]


@dataclass(frozen=True)
class EncodedMedium:
    """A file as it arrived."""

    modality: Modality
    data: bytes

    @cached_property
    def digest(self) -> bytes:
        return hashlib.sha256(self.data).digest()


@dataclass(frozen=True)
class DecodedMedium:
    """Arrays given directly, through vLLM's Python API."""

    modality: Modality
    array: np.ndarray
    """Video: (T, H, W, 3) uint8. Image: (H, W, 3) uint8. Audio: (n,) float32."""
    rate: float
    """Video: frames a second. Audio: samples a second. Image: 0."""

    @cached_property
    def digest(self) -> bytes:
        array = np.ascontiguousarray(self.array)
        head = f"{self.modality}|{self.rate}|{array.dtype}|{array.shape}|".encode()
        return hashlib.sha256(head + array.tobytes()).digest()


Medium = EncodedMedium | DecodedMedium
