"""Random prompts laid out as transformers' Qwen2.5-Omni processor and model do."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ep_serve.layout import Audio, Image, MediumShape, Video, build_layout
from tests.layout.prompts import AUDIOS, IMAGES, TOKENS, Prompt, prompts, videos

modeling: Any = pytest.importorskip("transformers.models.qwen2_5_omni.modeling_qwen2_5_omni")
processing: Any = pytest.importorskip("transformers.models.qwen2_5_omni.processing_qwen2_5_omni")

NAMES = {
    TOKENS.audio: "<|AUDIO|>",
    TOKENS.image: "<|IMAGE|>",
    TOKENS.video: "<|VIDEO|>",
    TOKENS.audio_bos: "<|audio_bos|>",
    TOKENS.audio_eos: "<|audio_eos|>",
    TOKENS.vision_bos: "<|vision_bos|>",
    TOKENS.vision_eos: "<|vision_eos|>",
}
IDS = {name: token for token, name in NAMES.items()}
LETTERS = 0x4E00  # text token i is written as one letter from here on

WITH_SOUND = prompts(videos(st.integers(1, 330)), IMAGES, AUDIOS)
WITHOUT_SOUND = prompts(videos(st.just(0)), IMAGES, AUDIOS)


def theirs_expanded(prompt: Prompt, with_sound: bool) -> list[int]:
    """The prompt's tokens as the processor multiplies its placeholders."""
    cls = processing.Qwen2_5OmniProcessor
    merge = SimpleNamespace(merge_size=TOKENS.spatial_merge_size)
    stub = SimpleNamespace(
        audio_token=NAMES[TOKENS.audio],
        image_token=NAMES[TOKENS.image],
        video_token=NAMES[TOKENS.video],
        audio_bos_token=NAMES[TOKENS.audio_bos],
        audio_eos_token=NAMES[TOKENS.audio_eos],
        vision_bos_token=NAMES[TOKENS.vision_bos],
        vision_eos_token=NAMES[TOKENS.vision_eos],
        image_processor=merge,
        video_processor=merge,
    )
    stub.get_chunked_index = partial(cls.get_chunked_index, stub)
    clips = [medium for medium in prompt.media if isinstance(medium, Video)]
    pictures = [medium for medium in prompt.media if isinstance(medium, Image)]
    text: str = cls.replace_multimodal_special_tokens(
        stub,
        ["".join(NAMES.get(token, chr(LETTERS + token)) for token in prompt.ids)],
        iter(sounds(prompt.media)),
        iter([np.array(picture.grid_thw) for picture in pictures]),
        iter([np.array(clip.grid_thw) for clip in clips]),
        video_second_per_grid=iter([clip.second_per_grid for clip in clips]),
        use_audio_in_video=with_sound,
        position_id_per_seconds=TOKENS.position_id_per_seconds,
        seconds_per_chunk=TOKENS.seconds_per_chunk,
    )[0]
    pieces = re.findall(r"<\|\w+\|>|.", text)
    return [IDS.get(piece, ord(piece[0]) - LETTERS) for piece in pieces]


def theirs_positions(
    ids: list[int], media: list[MediumShape], with_sound: bool
) -> tuple[torch.Tensor, int]:
    """Positions (3, L) and the delta of decoding, as the model computes them."""
    cls = modeling.Qwen2_5OmniPreTrainedModelForConditionalGeneration
    config = SimpleNamespace(
        image_token_id=TOKENS.image,
        video_token_id=TOKENS.video,
        audio_token_id=TOKENS.audio,
        vision_start_token_id=TOKENS.vision_bos,
        audio_start_token_id=TOKENS.audio_bos,
        position_id_per_seconds=TOKENS.position_id_per_seconds,
        seconds_per_chunk=TOKENS.seconds_per_chunk,
    )
    stub = SimpleNamespace(config=config, spatial_merge_size=TOKENS.spatial_merge_size)
    for name in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
        setattr(stub, name, partial(getattr(cls, name), stub))
    clips = [medium for medium in media if isinstance(medium, Video)]
    pictures = [medium for medium in media if isinstance(medium, Image)]
    input_ids = torch.tensor([ids], dtype=torch.int64)
    positions, deltas = cls.get_rope_index(
        stub,
        input_ids,
        torch.tensor([picture.grid_thw for picture in pictures]) if pictures else None,
        torch.tensor([clip.grid_thw for clip in clips]) if clips else None,
        torch.ones_like(input_ids),
        with_sound,
        torch.tensor([4 * count for count in sounds(media)]),  # 4 mel frames give one token
        torch.tensor([clip.second_per_grid for clip in clips]),
    )
    return positions[:, 0], int(deltas)


def sounds(media: list[MediumShape]) -> list[int]:
    """Audio tokens of each sound track and each sound of its own, in prompt order."""
    counts = [
        medium.tokens if isinstance(medium, Audio) else medium.audio_tokens
        for medium in media
        if not isinstance(medium, Image)
    ]
    return [count for count in counts if count]


def chunks_agree(clip: Video) -> bool:
    """Processor (float64) and model (float32) cut this clip at the same frames."""
    steps, span = np.arange(clip.grid_thw[0]), 50
    double = steps * clip.second_per_grid * 25
    single = steps.astype(np.float32) * np.float32(clip.second_per_grid) * np.float32(25)
    return bool((double // span == single // span).all())


def check(prompt: Prompt, with_sound: bool) -> None:
    layout = build_layout(prompt.ids, prompt.media, TOKENS)
    assert layout.token_ids.tolist() == theirs_expanded(prompt, with_sound)
    clips = [medium for medium in prompt.media if isinstance(medium, Video)]
    assume(layout.length and all(chunks_agree(clip) for clip in clips if with_sound))
    positions, delta = theirs_positions(layout.token_ids.tolist(), prompt.media, with_sound)
    np.testing.assert_array_equal(layout.positions, positions.numpy())
    assert layout.next_position - layout.length == delta


@settings(max_examples=150, deadline=None)
@given(WITH_SOUND)
@example(Prompt().add(Video((120, 2, 2), 2 / 1.98, 3000)))  # a frame on a chunk's border
@example(Prompt().add(Video((5, 4, 4), 7.5, 300)))  # steps that jump over chunks
def test_clips_with_sound_among_pictures_and_sounds_match(prompt: Prompt) -> None:
    check(prompt, with_sound=True)


@settings(max_examples=100, deadline=None)
@given(WITHOUT_SOUND)
def test_silent_clips_among_pictures_and_sounds_match(prompt: Prompt) -> None:
    check(prompt, with_sound=False)
