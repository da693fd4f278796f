"""Fetching media without decoding them.

vLLM decodes every medium when it fetches it. Here a medium stays the bytes it came as until the
processor needs it, so that a second question about the same clip decodes nothing, and so that the
sound of a video is read from the same bytes as its picture.
"""

from __future__ import annotations

import asyncio
import binascii
import weakref
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pybase64
import requests
import torch
from aiohttp import ClientError
from PIL import Image
from vllm.exceptions import VLLMError, VLLMUnprocessableEntityError, VLLMValidationError
from vllm.multimodal.media import MediaIO, MediaWithBytes
from vllm.multimodal.media.connector import (
    MEDIA_CONNECTOR_REGISTRY,
    MediaConnector,
    global_thread_pool,
)
from vllm.multimodal.parse import (
    ModalityDataItems,
    MultiModalDataParser,
    ProcessorBatchItems,
)

from ep_serve.engine.input.media_budget import TokenBudget
from ep_serve.engine.input.media_features import prepare
from ep_serve.engine.input.medium import DecodedMedium, EncodedMedium, Medium, Modality
from ep_serve.engine.input.request_memory import Share, fetching
from ep_serve.engine.metrics import metrics
from ep_serve.engine.settings import OPTIONS_KEY, MediaOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

CONNECTOR = "ep_serve"
"""Name of the connector in vLLM's registry (`VLLM_MEDIA_CONNECTOR`)."""

MAX_BYTES = 1 << 30
"""Largest file that is fetched."""


class EncodedIO(MediaIO[EncodedMedium]):
    """Keeps the bytes."""

    def __init__(self, modality: Modality) -> None:
        super().__init__()
        self.modality = modality

    def get_max_bytes(self) -> int:
        return MAX_BYTES

    def load_bytes(self, data: bytes) -> EncodedMedium:
        if len(data) > MAX_BYTES:
            raise VLLMValidationError(
                f"The {self.modality} has {len(data)} bytes; at most {MAX_BYTES} are accepted.",
                parameter=f"{self.modality}_url",
            )
        return EncodedMedium(self.modality, data)

    def load_base64(self, media_type: str, data: str) -> EncodedMedium:
        try:
            return self.load_bytes(pybase64.b64decode(data, validate=True))
        except (binascii.Error, ValueError):
            raise VLLMValidationError(
                f"The data of the {self.modality} is not valid base64.",
                parameter=f"{self.modality}_url",
            ) from None

    def load_file(self, filepath: Path) -> EncodedMedium:
        return self.load_bytes(filepath.read_bytes())


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class EncodedMediaConnector(MediaConnector):
    """vLLM's connector (limits, redirects, allowed domains), with media left encoded.

    vLLM makes one for each request.
    """

    @cached_property
    def _budget(self) -> TokenBudget:
        return TokenBudget()

    def fetch_video(self, video_url: str, **_: Any) -> EncodedMedium:
        return self._fetch("video", video_url)

    def fetch_audio(self, audio_url: str) -> EncodedMedium:
        return self._fetch("audio", audio_url)

    def fetch_image(self, image_url: str, **_: Any) -> EncodedMedium:
        return self._fetch("image", image_url)

    async def fetch_video_async(self, video_url: str, **_: Any) -> EncodedMedium:
        return await self._fetch_async("video", video_url)

    async def fetch_audio_async(self, audio_url: str) -> EncodedMedium:
        return await self._fetch_async("audio", audio_url)

    async def fetch_image_async(self, image_url: str, **_: Any) -> EncodedMedium:
        return await self._fetch_async("image", image_url)

    def _fetch(self, modality: Modality, url: str) -> EncodedMedium:
        try:
            return self.load_from_url(url, EncodedIO(modality), fetch_timeout=_timeout(modality))
        except Exception as error:
            raise _fetch_error(modality, error) from error

    async def _fetch_async(self, modality: Modality, url: str) -> EncodedMedium:
        try:
            with metrics().timed("fetch"), _counted(url) as share:
                medium = await self.load_from_url_async(
                    url, EncodedIO(modality), fetch_timeout=_timeout(modality)
                )
                if share is not None:
                    share.take(max(0, len(medium.data) - share.nbytes))  # a local file
                    weakref.finalize(medium, share.release)
        except Exception as error:
            raise _fetch_error(modality, error) from error
        if (options := self.media_io_kwargs.get(OPTIONS_KEY)) is not None:
            await asyncio.get_running_loop().run_in_executor(
                global_thread_pool, prepare, medium, MediaOptions(**options), self._budget
            )
        return medium


@contextmanager
def _counted(url: str) -> Iterator[Share | None]:
    """Count the bytes of a download as they arrive; a data URL is counted with its body."""
    if url[:5].lower() == "data:":
        yield None
        return
    share = Share()
    token = fetching.set(share)
    try:
        yield share
    except BaseException:
        share.release()
        raise
    finally:
        fetching.reset(token)


def _timeout(modality: Modality) -> int:
    from vllm import envs

    return {
        "video": envs.VLLM_VIDEO_FETCH_TIMEOUT,
        "audio": envs.VLLM_AUDIO_FETCH_TIMEOUT,
        "image": envs.VLLM_IMAGE_FETCH_TIMEOUT,
    }[modality]


def _fetch_error(modality: Modality, error: Exception) -> Exception:
    """HTTP 400: the URL is at fault, not the server."""
    if isinstance(error, VLLMError):
        return error
    parameter = f"{modality}_url"
    if isinstance(error, ClientError | requests.RequestException | TimeoutError | OSError):
        return VLLMUnprocessableEntityError(
            f"The {modality} could not be fetched from its URL ({type(error).__name__}).",
            parameter=parameter,
        )
    if isinstance(error, NotImplementedError):  # vLLM: a data URL that is not base64
        return VLLMValidationError(
            f"The {modality} must be a base64 data URL or an http(s) URL.", parameter=parameter
        )
    if isinstance(error, ValueError | RuntimeError):
        return VLLMValidationError(f"The {modality} URL is refused: {error}", parameter=parameter)
    return error


class MediumItems(ProcessorBatchItems[Medium]):
    """The media of one modality in a request; None where only an id was sent."""


class MediumParser(MultiModalDataParser):
    """Accepts encoded files (bytes, paths, what the connector fetched) and vLLM's usual arrays."""

    def _parse_video_data(self, data: Any) -> ModalityDataItems[Any, Any] | None:
        return _items("video", data, _decoded_video)

    def _parse_audio_data(self, data: Any) -> ModalityDataItems[Any, Any] | None:
        return _items("audio", data, _decoded_audio)

    def _parse_image_data(self, data: Any) -> ModalityDataItems[Any, Any] | None:
        return _items("image", data, _decoded_image)


def _items(modality: Modality, data: Any, decoded: Any) -> MediumItems | None:
    if data is None:
        return None
    several = isinstance(data, list) and not _is_one(modality, data)
    return MediumItems(
        [_medium(modality, item, decoded) for item in (data if several else [data])], modality
    )


def _is_one(modality: Modality, data: list[Any]) -> bool:
    """Whether a list is one medium: the frames of a video or the samples of a sound."""
    if modality == "video":
        return bool(data) and all(
            isinstance(f, Image.Image) or (hasattr(f, "ndim") and f.ndim == 3) for f in data
        )
    return modality == "audio" and bool(data) and isinstance(data[0], float)


def _medium(modality: Modality, item: Any, decoded: Any) -> Medium | None:
    if item is None or isinstance(item, EncodedMedium | DecodedMedium):
        return item
    if isinstance(item, bytes):
        return EncodedMedium(modality, item)
    if isinstance(item, Path):
        return EncodedMedium(modality, item.read_bytes())
    if isinstance(item, MediaWithBytes):
        return EncodedMedium(modality, item.original_bytes)
    try:
        medium: DecodedMedium = decoded(item)
    except (TypeError, ValueError) as error:
        raise VLLMValidationError(
            f"The {modality} has an unsupported form: {error}", parameter=modality
        ) from None
    return medium


def _array(value: Any) -> np.ndarray:
    return value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def _decoded_video(item: Any) -> DecodedMedium:
    metadata: dict[str, Any] = {}
    if isinstance(item, tuple):
        item, metadata = item[0], item[1] or {}
    frames = np.stack([_array(f) for f in item]) if isinstance(item, list) else _array(item)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames must be (T, H, W, 3) uint8, got {frames.shape} {frames.dtype}")
    return DecodedMedium("video", frames, float(metadata.get("fps") or 2.0))


def _decoded_audio(item: Any) -> DecodedMedium:
    samples, rate = item if isinstance(item, tuple) else (item, 16_000)
    wave = _array(samples).astype(np.float32)
    if wave.ndim == 2:
        wave = wave.mean(axis=int(wave.shape[0] > wave.shape[1]))
    if wave.ndim != 1 or not wave.size:
        raise ValueError(f"samples must be (n,), got {wave.shape}")
    return DecodedMedium("audio", wave, float(rate))


def _decoded_image(item: Any) -> DecodedMedium:
    pixels = np.array(item.convert("RGB")) if isinstance(item, Image.Image) else _array(item)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"an image must be (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
    return DecodedMedium("image", pixels, 0.0)
