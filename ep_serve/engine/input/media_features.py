"""From one medium to what the towers read: pixel patches and a log-mel spectrum.

The arithmetic is that of the checkpoint's own Hugging Face processor; media are processed one by
one, so that each can be remembered by its content.
"""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from cachetools import LRUCache
from vllm.exceptions import VLLMValidationError

from ep_serve import media
from ep_serve.engine.input.decoding import Decoder, Measure
from ep_serve.engine.input.media_budget import MemoryGate, TokenBudget
from ep_serve.engine.input.media_ids import MediaId, MediaIds
from ep_serve.engine.input.medium import Medium, Modality
from ep_serve.engine.metrics import metrics
from ep_serve.layout import Audio, Image, MediumShape, Video, audio_token_count, video_tokens
from ep_serve.preprocess.features import (
    SAMPLE_RATE,
    TEMPORAL_PATCH,
    VIDEO_PIXELS,
    Bounds,
    image_patches,
    log_mel,
    video_patches,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ep_serve.engine.settings import MediaOptions, Settings

MERGE = 2
"""Patches along the side of a token."""
MEASURED = 64
"""Media that were measured and not yet decoded."""
REMEMBERED = 65_536
"""Number of media whose shape is remembered."""


@dataclass(frozen=True)
class MediumFeatures:
    """What the towers need of one medium, and its shape for the layout."""

    key: bytes
    """Hash of the content and of the options that shaped it (32 bytes)."""
    shape: MediumShape
    pixel_values: torch.Tensor | None = None
    """(patches, values) in the model's dtype; None for a sound."""
    grid_thw: tuple[int, int, int] = (0, 0, 0)
    mel: torch.Tensor | None = None
    """(bins, frames) in the model's dtype; None without sound."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.pixel_values, self.mel) if t is not None)


class MediaProcessor:
    """Decodes media, computes their features and caches the most recent.

    Thread-safe. `hits` and `misses` count look-ups in the cache.
    """

    def __init__(self, hf_processor: Any, settings: Settings, dtype: torch.dtype) -> None:
        self._video_processor = hf_processor.video_processor
        self._image_processor = hf_processor.image_processor
        self._feature_extractor = hf_processor.feature_extractor
        self._settings = settings
        self._decoder = Decoder(settings)
        self._gate = MemoryGate(max(1, int(settings.engine.decode_memory_gib * 2**30)))
        self._dtype = dtype
        capacity = max(1, int(settings.engine.media_cache_gib * 2**30))
        self._recent: LRUCache[bytes, MediumFeatures] = LRUCache(
            capacity, getsizeof=lambda f: f.nbytes
        )
        self._running: dict[bytes, Future[MediumFeatures]] = {}
        self._ids = MediaIds()
        self._shapes: LRUCache[bytes, MediumShape] = LRUCache(REMEMBERED)
        self._measures: LRUCache[bytes, Measure] = LRUCache(MEASURED)
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def key(self, medium: Medium | None, name: MediaId | None, options: MediaOptions) -> bytes:
        """The name under which the features of a medium are remembered.

        It comes from the content and from the options that shape the features.

        Args:
            medium: None if the client sent only an id.
            name: the id that the client gives the content (`uuid`), if any.
            options: those in force for the request.

        Raises:
            VLLMValidationError: an id that refers to other content, or to none (HTTP 400).
        """
        if medium is not None:
            content = _content(medium)
            if name is not None:
                self._ids.check(name, content)
        else:
            assert name is not None, "vLLM refuses a medium without data and id"
            content = self._ids.content(name)
        return hashlib.sha256(content + repr(options.shaping).encode()).digest()

    def remember_id(self, medium: Medium | None, name: MediaId | None) -> None:
        """Bind an id to a medium whose features were computed.

        Raises:
            VLLMValidationError: it has come to stand for other content meanwhile (HTTP 400).
        """
        if medium is not None and name is not None:
            self._ids.bind(name, _content(medium))

    def shape(self, medium: Medium | None, key: bytes, options: MediaOptions) -> MediumShape:
        """What the layout needs to know of a medium; it is remembered longer than the features.

        Raises:
            VLLMValidationError: what is wrong with the file (HTTP 400).
        """
        with self._lock:
            known = self._shapes.get(key)
        return known if known is not None else self.features(medium, key, options).shape

    def check_tokens(
        self, medium: Medium | None, key: bytes, options: MediaOptions, budget: TokenBudget
    ) -> None:
        """Count the tokens of a medium against a request's budget, before it is decoded.

        Raises:
            VLLMValidationError: too many, or what is wrong with the file (HTTP 400).
        """
        with self._lock:
            shape = self._shapes.get(key)
        if shape is not None:
            tokens = token_count(shape)
        elif medium is not None:
            bounds = self._pixel_bounds(medium.modality, options)
            tokens = self._measure(medium, key, options, bounds).tokens
        else:  # only an id: its features are known, or it is refused by `features`
            return
        budget.take(tokens, self._settings.max_full_tokens)

    def features(self, medium: Medium | None, key: bytes, options: MediaOptions) -> MediumFeatures:
        """Look the features up, or compute them.

        Raises:
            VLLMValidationError: what is wrong with the file (HTTP 400).
        """
        with self._lock:
            found = self._recent.get(key)
            if found is not None:
                self.hits += 1
                return found
            running = self._running.get(key)
            if running is None:
                self.misses += 1
                mine = self._running[key] = Future()
        if running is not None:  # another request brought the same medium a moment ago
            return running.result()
        try:
            computed = self._compute(medium, key, options)
        except BaseException as error:
            with self._lock:
                del self._running[key]
            mine.set_exception(error)
            raise
        with self._lock:  # in one step: a request must find the work running, or its result
            del self._running[key]
            self._shapes[key] = computed.shape
            if computed.nbytes <= self._recent.maxsize:
                self._recent[key] = computed
        mine.set_result(computed)
        return computed

    def _compute(self, medium: Medium | None, key: bytes, options: MediaOptions) -> MediumFeatures:
        if medium is None:
            raise self._only_an_id(key, options)
        bounds = self._pixel_bounds(medium.modality, options)
        measure = self._measure(medium, key, options, bounds)
        with _refusals(medium), self._gate.hold(measure.nbytes):
            return self._decode(medium, key, options, bounds, measure)

    def _decode(
        self, medium: Medium, key: bytes, options: MediaOptions, bounds: Bounds, measure: Measure
    ) -> MediumFeatures:
        with metrics().timed("decode"):
            decoded = self._decoder.decode(medium, options, bounds, measure)
        with metrics().timed("features"):
            if isinstance(decoded, media.Clip):
                return self._video(key, decoded, bounds)
            if medium.modality == "audio":
                return self._sound(key, decoded)
            return self._image(key, decoded, bounds)

    def _measure(
        self, medium: Medium, key: bytes, options: MediaOptions, bounds: Bounds
    ) -> Measure:
        with self._lock:
            known = self._measures.get(key)
        if known is not None:
            return known
        with _refusals(medium):
            measure = self._decoder.measure(medium, options, bounds)
        with self._lock:
            self._measures[key] = measure
        return measure

    def _only_an_id(self, key: bytes, options: MediaOptions) -> VLLMValidationError:
        with self._lock:
            processed = key in self._shapes
        shaping = ", ".join(f"{name} {value}" for name, value in options.shaping.items())
        reason = "are no longer remembered" if processed else f"were never computed with {shaping}"
        return VLLMValidationError(
            f"A medium was sent only as an id (uuid). The id is known, but its features {reason}; "
            "send its data.",
            parameter="uuid",
        )

    def _pixel_bounds(self, modality: Modality, options: MediaOptions) -> Bounds:
        """Least and most pixels of a frame or picture.

        Raises:
            VLLMValidationError: the request asks for more than the server allows (HTTP 400).
        """
        size = self._image_processor.size
        own = (size["shortest_edge"], size["longest_edge"])
        low, high = VIDEO_PIXELS if modality == "video" else own
        limit = self._settings.media.pixel_limit(high)
        for name in ("min_pixels", "max_pixels"):
            value = getattr(options, name)
            if value is not None and value > limit:
                raise VLLMValidationError(
                    f"{name} must be at most {limit} for {modality} input, the limit of this "
                    f"server (got {value}).",
                    parameter=name,
                )
        # A bound that is asked for moves the other one if they cross.
        if options.min_pixels is not None:
            low, high = options.min_pixels, max(high, options.min_pixels)
        if options.max_pixels is not None:
            low, high = min(low, options.max_pixels), options.max_pixels
        return low, high

    # -- features ------------------------------------------------------------------------------

    def _video(self, key: bytes, clip: media.Clip, bounds: Bounds) -> MediumFeatures:
        patches, grid = video_patches(self._video_processor, clip.frames, bounds, self._dtype)
        mel = None if clip.sound is None else self._mel(clip.sound)
        tokens = 0 if mel is None else audio_token_count(mel.shape[1])
        return MediumFeatures(
            key=key,
            shape=Video(grid, second_per_grid=TEMPORAL_PATCH / clip.fps, audio_tokens=tokens),
            pixel_values=patches,
            grid_thw=grid,
            mel=mel if tokens else None,
        )

    def _image(self, key: bytes, pixels: np.ndarray, bounds: Bounds) -> MediumFeatures:
        patches, grid = image_patches(self._image_processor, pixels, bounds)
        return MediumFeatures(
            key=key, shape=Image(grid), pixel_values=patches.to(self._dtype), grid_thw=grid
        )

    def _sound(self, key: bytes, waveform: np.ndarray) -> MediumFeatures:
        mel = self._mel(waveform)
        tokens = audio_token_count(mel.shape[1])
        if not tokens:
            raise media.MediaError(
                f"The sound is too short: {len(waveform)} samples at {SAMPLE_RATE} Hz give no token"
            )
        return MediumFeatures(key=key, shape=Audio(tokens), mel=mel)

    def _mel(self, waveform: np.ndarray) -> torch.Tensor:
        """(bins, frames) log-mel spectrum in the model's dtype."""
        return log_mel(self._feature_extractor, waveform).to(self._dtype).contiguous()


def _content(medium: Medium) -> bytes:
    return medium.modality.encode() + medium.digest


@contextmanager
def _refusals(medium: Medium) -> Iterator[None]:
    """Errors about a file as HTTP 400 to the part of the request that it came in."""
    try:
        yield
    except media.MediaError as error:
        raise VLLMValidationError(str(error), parameter=f"{medium.modality}_url") from None


def token_count(shape: MediumShape) -> int:
    """Audio, video and image tokens of a medium before reduction."""
    if isinstance(shape, Audio):
        return shape.tokens
    sound = shape.audio_tokens if isinstance(shape, Video) else 0
    return video_tokens(shape.grid_thw, MERGE) + sound


_current: MediaProcessor | None = None


def set_current(processor: MediaProcessor) -> None:
    """Let the media connector of this process prepare media for `processor`."""
    global _current
    _current = processor


def prepare(medium: Medium, options: MediaOptions, budget: TokenBudget) -> None:
    """Compute the features of a medium that a request will ask for in a moment.

    vLLM processes the prompts of a process one after the other; what is prepared while media are
    fetched runs side by side.

    Args:
        medium: one of the request's media.
        options: those of the request.
        budget: that of the request.

    Raises:
        VLLMValidationError: what is wrong with the file, or too many tokens (HTTP 400).
    """
    if _current is not None:
        key = _current.key(medium, None, options)
        _current.check_tokens(medium, key, options, budget)
        _current.features(medium, key, options)
