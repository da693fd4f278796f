from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from vllm.exceptions import VLLMValidationError

from ep_serve.checkpoint.embedded import build
from ep_serve.engine.input.media_features import MediaProcessor
from ep_serve.engine.input.media_ids import MediaId, scoped
from ep_serve.engine.input.medium import EncodedMedium
from ep_serve.engine.settings import EngineSettings, MediaOptions, MediaSettings, Settings
from ep_serve.layout import Kind
from ep_serve.media import decodes
from ep_serve.preprocess.features import video_patches
from tests.clips import make_clip, make_image, make_wav
from tests.goldens import CASES, CHECKPOINT, GOLDENS, load_case, needs_goldens

OPTIONS = MediaOptions(
    keep_ratio=0.2,
    rho_audio=None,
    rho_video=None,
    fps=2.0,
    min_pixels=3136,
    max_pixels=200_704,
    sound=True,
)
SETTINGS = Settings(
    media=MediaSettings(),
    engine=EngineSettings(),
    sieve="cs2",
    refines=True,
    keep_ratio=0.2,
    max_full_tokens=10_000,
)


@pytest.fixture(scope="module")
def hf_processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return Qwen2_5OmniProcessor.from_pretrained(build(tmp_path_factory.mktemp("m") / "m"))


@pytest.fixture
def processor(hf_processor: Any) -> MediaProcessor:
    return MediaProcessor(hf_processor, SETTINGS, torch.float32)


def features(processor: MediaProcessor, medium: EncodedMedium, **changes: object) -> Any:
    options = OPTIONS.model_copy(update=changes)
    return processor.features(medium, processor.key(medium, None, options), options)


def test_equal_content_is_processed_once(processor: MediaProcessor) -> None:
    clip = make_clip(2)
    first = features(processor, EncodedMedium("video", clip))
    again = features(processor, EncodedMedium("video", bytes(clip)), keep_ratio=0.1)
    assert again is first
    assert (processor.hits, processor.misses) == (1, 1)


def test_other_options_are_other_features(processor: MediaProcessor) -> None:
    clip = EncodedMedium("video", make_clip(4))
    grids = [
        features(processor, clip, **changes).grid_thw
        for changes in ({}, {"fps": 1.0}, {"max_pixels": 3136})
    ]
    assert grids == [(4, 8, 8), (2, 8, 8), (4, 4, 4)]
    assert features(processor, clip, sound=False).mel is None


def test_the_same_bytes_under_another_modality_are_something_else(
    processor: MediaProcessor,
) -> None:
    data = make_clip(2)
    assert features(processor, EncodedMedium("video", data)).pixel_values is not None
    assert features(processor, EncodedMedium("audio", data)).pixel_values is None


def given(processor: MediaProcessor, medium: EncodedMedium, name: MediaId) -> Any:
    """What a request does with a medium that comes under an id."""
    key = processor.key(medium, name, OPTIONS)
    found = processor.features(medium, key, OPTIONS)
    processor.remember_id(medium, name)
    return found


def test_an_id_stands_for_content_that_came_with_it(processor: MediaProcessor) -> None:
    name = MediaId("image", "cat")
    first = given(processor, EncodedMedium("image", make_image()), name)
    key = processor.key(None, name, OPTIONS)
    assert key == first.key
    assert processor.features(None, key, OPTIONS) is first
    with pytest.raises(VLLMValidationError, match=r"'dog' \(image\) is not cached"):
        processor.key(None, MediaId("image", "dog"), OPTIONS)


def test_other_content_under_a_known_id_is_refused(processor: MediaProcessor) -> None:
    cat, dog = (EncodedMedium("image", make_image(number=number)) for number in (1, 2))
    name = MediaId("image", "cat")
    first = given(processor, cat, name)
    for _ in range(2):
        with pytest.raises(VLLMValidationError, match=r"'cat' .* already refers to other") as no:
            given(processor, dog, name)
        assert no.value.parameter == "uuid"
        assert processor.key(None, name, OPTIONS) == first.key
    assert given(processor, cat, name) is first


def test_of_two_that_claim_an_id_at_a_time_the_second_is_refused(
    processor: MediaProcessor,
) -> None:
    cat, dog = (EncodedMedium("image", make_image(number=number)) for number in (1, 2))
    name = MediaId("image", "cat")
    for medium in (cat, dog):
        processor.key(medium, name, OPTIONS)  # neither has been processed yet
    processor.remember_id(cat, name)
    with pytest.raises(VLLMValidationError, match="already refers to other"):
        processor.remember_id(dog, name)


def test_a_file_that_cannot_be_used_takes_no_id(processor: MediaProcessor) -> None:
    name = MediaId("audio", "bell")
    with pytest.raises(VLLMValidationError):
        given(processor, EncodedMedium("audio", b"noise"), name)
    assert given(processor, EncodedMedium("audio", make_wav(1)), name).mel is not None


def test_an_id_of_a_video_is_none_of_a_sound(processor: MediaProcessor) -> None:
    data = make_clip(2)
    video, audio = (MediaId(modality, "clip") for modality in ("video", "audio"))
    given(processor, EncodedMedium("video", data), video)
    with pytest.raises(VLLMValidationError, match=r"'clip' \(audio\) is not cached"):
        processor.key(None, audio, OPTIONS)
    assert given(processor, EncodedMedium("audio", data), audio).pixel_values is None


def test_an_id_alone_says_which_options_its_features_lack(processor: MediaProcessor) -> None:
    name = MediaId("video", "clip")
    given(processor, EncodedMedium("video", make_clip(2)), name)
    options = OPTIONS.model_copy(update={"fps": 1.0})
    with pytest.raises(VLLMValidationError, match=r"id is known, .* never computed with fps 1\.0"):
        processor.shape(None, processor.key(None, name, options), options)


def test_an_id_alone_says_that_its_features_were_forgotten(hf_processor: Any) -> None:
    engine = EngineSettings(media_cache_gib=0)
    forgetful = MediaProcessor(
        hf_processor, SETTINGS.model_copy(update={"engine": engine}), torch.float32
    )
    name = MediaId("image", "cat")
    given(forgetful, EncodedMedium("image", make_image()), name)
    key = forgetful.key(None, name, OPTIONS)
    assert forgetful.shape(None, key, OPTIONS).kind == Kind.IMAGE
    with pytest.raises(VLLMValidationError, match=r"id is known, .* no longer remembered"):
        forgetful.features(None, key, OPTIONS)


def test_ids_are_those_of_a_cache_salt() -> None:
    def name(salt: str | None, given: str) -> str:
        part = {"type": "video_url", "video_url": None, "uuid": given}
        message = {"role": "user", "content": [{"type": "text", "text": "x"}, part]}
        (found,) = scoped([message], salt)
        assert found["content"][0] == message["content"][0]
        assert part["uuid"] == given
        return str(found["content"][1]["uuid"])

    names = [name(salt, "clip") for salt in (None, "anna", "ben")]
    assert len(set(names)) == 3
    assert names == [name(salt, "clip") for salt in (None, "anna", "ben")]
    assert name(None, "anna\x1fclip") not in names  # the separator does not lead elsewhere
    assert MediaId("video", names[1]).given == "clip"
    assert scoped([{"role": "user", "content": "x"}], "anna") == [{"role": "user", "content": "x"}]


class HookedLock:
    """A lock that calls a function after each release."""

    def __init__(self, released: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._released = released

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
        self._released()


def test_a_request_between_two_steps_of_another_finds_its_features(
    processor: MediaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    medium = EncodedMedium("image", make_image())
    compute, computed = processor._compute, []
    finished: list[Any] = []

    def counted(*args: Any) -> Any:
        computed.append(compute(*args))
        return computed[-1]

    def another_request() -> None:
        if computed and not finished:
            finished.append(None)  # one is enough
            thread = threading.Thread(target=lambda: finished.append(features(processor, medium)))
            thread.start()
            thread.join(0.5)  # it may have to wait for the first to go on

    monkeypatch.setattr(processor, "_compute", counted)
    monkeypatch.setattr(processor, "_lock", HookedLock(another_request))
    features(processor, medium)
    assert features(processor, medium) is computed[0]
    assert len(computed) == 1


def test_requests_at_the_same_time_share_the_work(
    processor: MediaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = processor._compute

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return compute(*args)

    monkeypatch.setattr(processor, "_compute", slow)
    medium = EncodedMedium("audio", make_wav(1))
    results: list[Any] = []
    threads = [
        threading.Thread(target=lambda: results.append(features(processor, medium)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    assert all(result is results[0] for result in results)
    assert processor.misses == 1


def test_a_bad_file_is_refused_by_name_and_not_remembered(processor: MediaProcessor) -> None:
    for _ in range(2):
        with pytest.raises(VLLMValidationError) as refusal:
            features(processor, EncodedMedium("audio", b"noise"))
        assert refusal.value.parameter == "audio_url"
    assert processor.misses == 2


def test_large_frames_shrink_while_they_are_decoded(
    processor: MediaProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, ...]] = []

    def watched(processor: Any, frames: np.ndarray, *more: Any) -> Any:
        seen.append(frames.shape)
        return video_patches(processor, frames, *more)

    monkeypatch.setattr("ep_serve.engine.input.media_features.video_patches", watched)
    clip = EncodedMedium("video", make_clip(1, size=(640, 480)))
    found = features(processor, clip, max_pixels=112 * 112)
    assert seen == [(4, 84, 112, 3)]
    assert found.grid_thw == (2, 6, 8)


PIXEL_LIMITS = {"video": 768 * 28 * 28, "image": 1280 * 28 * 28}


@pytest.mark.parametrize("field", ["min_pixels", "max_pixels"])
@pytest.mark.parametrize("modality", ["video", "image"])
def test_more_pixels_than_the_model_takes_are_refused_before_decoding(
    hf_processor: Any, modality: Any, field: str
) -> None:
    image_processor = SimpleNamespace(
        size={"shortest_edge": 3136, "longest_edge": PIXEL_LIMITS["image"]}
    )
    processor = MediaProcessor(
        SimpleNamespace(**vars(hf_processor) | {"image_processor": image_processor}),
        SETTINGS,
        torch.float32,
    )
    limit = PIXEL_LIMITS[modality]
    medium = EncodedMedium(modality, make_clip(1) if modality == "video" else make_image())
    before = decodes.value(modality)
    with pytest.raises(VLLMValidationError) as refusal:
        features(processor, medium, **{"min_pixels": None, "max_pixels": None, field: limit + 1})
    assert refusal.value.parameter == field
    assert f"{field} must be at most {limit} for {modality} input" in str(refusal.value)
    assert decodes.value(modality) == before


def test_a_server_may_raise_the_most_pixels_of_frames(hf_processor: Any) -> None:
    media = MediaSettings(max_pixels=1280 * 28 * 28)
    processor = MediaProcessor(
        hf_processor, SETTINGS.model_copy(update={"media": media}), torch.float32
    )
    found = features(
        processor, EncodedMedium("video", make_clip(1)), min_pixels=900 * 784, max_pixels=None
    )
    assert found.grid_thw[1] * found.grid_thw[2] / 4 >= 900


@needs_goldens
@pytest.mark.parametrize("name", [name for name in CASES if name != "text_only"])
def test_features_are_those_of_the_authors_processor(name: str) -> None:
    case, tensors = load_case(name)
    golden = MediaProcessor(
        Qwen2_5OmniProcessor.from_pretrained(CHECKPOINT), SETTINGS, torch.float32
    )
    options = OPTIONS.model_copy(update={"fps": case["processor_kwargs"].get("fps", 2.0)})
    found = [
        golden.features(medium, golden.key(medium, None, options), options)
        for message in case["messages"]
        for part in message["content"]
        if part["type"] != "text"
        for medium in [EncodedMedium(part["type"], (GOLDENS / part[part["type"]]).read_bytes())]
    ]
    patches: dict[Kind, list[Any]] = {Kind.VIDEO: [], Kind.IMAGE: [], Kind.AUDIO: []}
    for f in found:
        patches[f.shape.kind].append(f.pixel_values)
    videos, images = patches[Kind.VIDEO], patches[Kind.IMAGE]
    sounds = [f.mel for f in found if f.mel is not None]
    for values, key in ((videos, "proc.pixel_values_videos"), (images, "proc.pixel_values")):
        if values:
            torch.testing.assert_close(torch.cat(values), tensors[key], atol=1e-5, rtol=0)
    for index, mel in enumerate(sounds):
        reference = tensors[f"proc.input_features.{index}"]
        np.testing.assert_allclose(mel.numpy(), reference.numpy(), atol=1e-4)
