"""What media cost is known, and bounded, before they are decoded."""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from vllm.exceptions import VLLMValidationError

from ep_serve.checkpoint.embedded import build
from ep_serve.engine.input import media_features
from ep_serve.engine.input.connector import EncodedMediaConnector
from ep_serve.engine.input.decoding import Decoder, Measure
from ep_serve.engine.input.media_budget import MemoryGate, TokenBudget
from ep_serve.engine.input.media_features import MediaProcessor, token_count
from ep_serve.engine.input.medium import DecodedMedium, EncodedMedium, Medium
from ep_serve.engine.settings import (
    OPTIONS_KEY,
    EngineSettings,
    MediaOptions,
    MediaSettings,
    Settings,
)
from ep_serve.media import MediaError, decodes
from tests.clips import make_clip, make_image, make_sound, make_wav

BOUNDS = (3136, 200_704)
OPTIONS = MediaOptions(
    keep_ratio=0.2,
    rho_audio=None,
    rho_video=None,
    fps=2.0,
    min_pixels=BOUNDS[0],
    max_pixels=BOUNDS[1],
    sound=True,
)


def settings(max_full_tokens: int, decode_memory_gib: float = 4.0) -> Settings:
    return Settings(
        media=MediaSettings(),
        engine=EngineSettings(decode_memory_gib=decode_memory_gib),
        sieve="cs2",
        refines=True,
        keep_ratio=0.2,
        max_full_tokens=max_full_tokens,
    )


@pytest.fixture(scope="module")
def make_processor(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., MediaProcessor]:
    hf_processor = Qwen2_5OmniProcessor.from_pretrained(build(tmp_path_factory.mktemp("m") / "m"))

    def make(*arguments: Any) -> MediaProcessor:
        return MediaProcessor(hf_processor, settings(*arguments), torch.float32)

    return make


def video(data: bytes) -> EncodedMedium:
    return EncodedMedium("video", data)


def audio(data: bytes) -> EncodedMedium:
    return EncodedMedium("audio", data)


def image(data: bytes) -> EncodedMedium:
    return EncodedMedium("image", data)


MEDIA: dict[str, Callable[[], Medium]] = {
    "a clip with sound": lambda: video(make_clip(4)),
    "a silent clip": lambda: video(make_clip(3, sound_rate=None)),
    "a matroska": lambda: video(make_clip(4, container="matroska", sound_rate=48_000)),
    "an avi": lambda: video(make_clip(4, codec="mpeg4", container="avi", sound_rate=48_000)),
    "a transport stream": lambda: video(make_clip(4, container="mpegts", sound_rate=48_000)),
    "a sound longer than the picture": lambda: video(make_clip(2, sound_seconds=6)),
    "a sound that starts late": lambda: video(make_clip(4, sound_seconds=2, sound_start=2)),
    "a portrait": lambda: video(make_clip(2, size=(140, 112), rotation=90)),
    "large frames": lambda: video(make_clip(2, size=(1280, 720))),
    "a wav": lambda: audio(make_wav(3)),
    "an ogg": lambda: audio(make_sound(3, 48_000, container="ogg")),
    "an mp3": lambda: audio(make_sound(3, 48_000, codec="libmp3lame", container="mp3")),
    "a flac": lambda: audio(make_sound(3, 44_100, 2, container="flac")),
    "the sound of a clip": lambda: audio(make_clip(4)),
    "a picture": lambda: image(make_image(1000, 700)),
    "a small picture": lambda: image(make_image(20, 30, "JPEG")),
    "frames as an array": lambda: DecodedMedium("video", np.zeros((5, 60, 80, 3), np.uint8), 2.0),
    "samples as an array": lambda: DecodedMedium("audio", np.zeros(44_100, np.float32), 22_050),
    "pixels as an array": lambda: DecodedMedium("image", np.zeros((60, 80, 3), np.uint8), 0.0),
}


@pytest.mark.parametrize("make", MEDIA.values(), ids=MEDIA.keys())
def test_tokens_are_estimated_without_decoding(
    make_processor: Callable[..., MediaProcessor], make: Callable[[], Medium]
) -> None:
    processor, medium = make_processor(10_000), make()
    before = sum(decodes.value(kind) for kind in ("video", "audio", "image"))
    measure = processor._decoder.measure(medium, OPTIONS, BOUNDS)
    assert sum(decodes.value(kind) for kind in ("video", "audio", "image")) == before
    real = token_count(processor.features(medium, b"key", OPTIONS).shape)
    assert real - 12 <= measure.tokens <= real
    assert measure.nbytes > 0


LONG: dict[str, tuple[Literal["video", "audio", "image"], Callable[[], bytes]]] = {
    "video": ("video", lambda: make_clip(30, fps=2, size=(448, 448), sound_rate=None)),
    "sound of a video": ("audio", lambda: make_clip(2, sound_seconds=60)),
    "audio": ("audio", lambda: make_wav(60)),
    "image": ("image", lambda: make_image(3000, 2000, "JPEG")),
}


@pytest.mark.parametrize(("kind", "make"), LONG.values(), ids=LONG.keys())
def test_a_medium_over_the_token_limit_is_not_decoded(
    make_processor: Callable[..., MediaProcessor],
    kind: Literal["video", "audio", "image"],
    make: Callable[[], bytes],
) -> None:
    processor, medium = make_processor(200), EncodedMedium(kind, make())
    before = decodes.value(kind)
    key = processor.key(medium, None, OPTIONS)
    with pytest.raises(VLLMValidationError, match=r"limit of 200\b") as error:
        processor.check_tokens(medium, key, OPTIONS, TokenBudget())
    assert error.value.parameter == "messages"
    assert decodes.value(kind) == before


def test_the_media_of_a_request_count_together_while_they_are_fetched(
    make_processor: Callable[..., MediaProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_features, "_current", make_processor(250))
    urls = [
        "data:audio/wav;base64," + base64.b64encode(make_wav(seconds)).decode()
        for seconds in (3.0, 3.1, 3.2, 3.3, 3.4, 3.5)
    ]

    async def fetch() -> list[Any]:
        connector = EncodedMediaConnector(media_io_kwargs={OPTIONS_KEY: OPTIONS.model_dump()})
        fetches = (connector.fetch_audio_async(url) for url in urls)
        return await asyncio.gather(*fetches, return_exceptions=True)

    before = decodes.value("audio")
    outcomes = asyncio.run(fetch())
    refused = [one for one in outcomes if isinstance(one, VLLMValidationError)]
    assert len(refused) == 3  # some 75 tokens each
    assert all("more than the limit of 250" in str(one) for one in refused)
    assert decodes.value("audio") == before + 3


def test_a_sound_much_longer_than_its_packets_state_is_refused() -> None:
    decoder = Decoder(settings(10_000))
    with pytest.raises(MediaError, match="longer than the limit of 12 s"):
        decoder.decode(audio(make_wav(20)), OPTIONS, BOUNDS, Measure(20, 1, sound_s=1.0))


def test_frames_much_larger_than_the_header_states_are_refused() -> None:
    decoder = Decoder(settings(10_000))
    clip = video(make_clip(2, size=(640, 480)))
    measure = decoder.measure(clip, OPTIONS, BOUNDS)
    decoder.decode(clip, OPTIONS, BOUNDS, measure)
    with pytest.raises(MediaError, match="640x480 pixels, more than its header states"):
        decoder.decode(clip, OPTIONS, BOUNDS, replace(measure, nbytes=measure.nbytes // 3))


def test_decoding_waits_for_memory(
    make_processor: Callable[..., MediaProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor = make_processor(10_000, 0.0004)  # no two sounds at once
    running: list[int] = []
    decode = processor._decoder.decode

    def watched(*arguments: Any) -> Any:
        running.append(1)
        time.sleep(0.02)
        assert sum(running) == 1
        running.append(-1)
        return decode(*arguments)

    monkeypatch.setattr(processor._decoder, "decode", watched)
    sounds = [audio(make_wav(1 + n / 10)) for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        keys = [processor.key(sound, None, OPTIONS) for sound in sounds]
        found = pool.map(processor.features, sounds, keys, [OPTIONS] * 6)
        assert len({f.key for f in found}) == 6


def test_memory_is_given_up_to_the_limit_and_in_order() -> None:
    gate = MemoryGate(10)
    held: list[int] = []
    order: list[int] = []
    lock = threading.Lock()

    def take(nbytes: int) -> None:
        with gate.hold(nbytes):
            with lock:
                order.append(nbytes)
                held.append(min(nbytes, 10))
                assert sum(held) <= 10
            time.sleep(0.01)
            with lock:
                held.append(-min(nbytes, 10))

    with ThreadPoolExecutor(8) as pool, gate.hold(10):
        waiting = []
        for nbytes in (4, 100, 3, 7, 6):
            waiting.append(pool.submit(take, nbytes))
            while len(gate._waiting) < len(waiting):
                time.sleep(0.001)
        assert not order
    for one in waiting:
        one.result()
    assert order[:2] == [4, 100]
    assert gate._free == 10


def test_memory_is_given_back_after_an_error() -> None:
    gate = MemoryGate(10)
    with pytest.raises(ValueError, match="broken"), gate.hold(7):
        raise ValueError("broken")
    assert gate._free == 10
