"""Layouts equal the authors' prompts and positions in every golden case."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from ep_serve.layout import (
    Audio,
    Image,
    Kind,
    Layout,
    MediaTokens,
    MediumShape,
    Video,
    audio_token_count,
    build_layout,
    keep_count,
    video_tokens,
)
from tests.goldens import CASES, CHECKPOINT, load_case, needs_goldens

pytestmark = needs_goldens


@cache
def checkpoint_tokens() -> MediaTokens:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    return MediaTokens.from_config(config["thinker_config"])


def media_of(name: str, prompt: list[int], tokens: MediaTokens) -> list[MediumShape]:
    """The media of a case in prompt order, out of what the authors' processor saw."""
    case, tensors = load_case(name)
    none = torch.empty(0, dtype=torch.int64)
    sounds = iter(
        [audio_token_count(n) for n in tensors.get("proc.feature_lengths", none).tolist()]
    )
    clips = iter(tensors.get("proc.video_grid_thw", none).tolist())
    pictures = iter(tensors.get("proc.image_grid_thw", none).tolist())
    second_per_grid = 2 / case["processor_kwargs"].get("fps", 2.0)
    media: list[MediumShape] = []
    for token in prompt:
        if token == tokens.video:
            sound = next(sounds) if case["use_audio_in_video"] else 0
            media.append(Video(tuple(next(clips)), second_per_grid, sound))
        elif token == tokens.audio:
            media.append(Audio(next(sounds)))
        elif token == tokens.image:
            media.append(Image(tuple(next(pictures))))
    return media


@cache
def layout_of(name: str) -> Layout:
    case, _ = load_case(name)
    tokens = checkpoint_tokens()
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    prompt: list[int] = tokenizer.encode(case["prompt_text"], add_special_tokens=False).ids
    return build_layout(prompt, media_of(name, prompt, tokens), tokens)


@pytest.mark.parametrize("name", CASES)
def test_the_expanded_prompt_is_the_authors(name: str) -> None:
    _, tensors = load_case(name)
    np.testing.assert_array_equal(layout_of(name).token_ids, tensors["proc.input_ids"][0].numpy())


@pytest.mark.parametrize("name", CASES)
def test_the_positions_are_the_authors(name: str) -> None:
    _, tensors = load_case(name)
    np.testing.assert_array_equal(
        layout_of(name).positions, tensors["rope.position_ids"][:3].numpy()
    )


@pytest.mark.parametrize("name", CASES)
def test_decoding_goes_on_where_the_authors_do(name: str) -> None:
    case, tensors = load_case(name)
    layout = layout_of(name)
    assert layout.next_position - layout.length == tensors["rope.rope_deltas"].item()
    assert layout.next_position == case["stats"]["decode_position_ids"][0]


@pytest.mark.parametrize("name", [name for name in CASES if name != "text_only"])
def test_the_pool_and_its_budget_are_the_authors(name: str) -> None:
    case, tensors = load_case(name)
    layout = layout_of(name)
    np.testing.assert_array_equal(np.flatnonzero(layout.is_av), tensors["score.av_indices"].numpy())
    stats = case["stats"]
    assert layout.counts() == {
        Kind.VIDEO: stats["n_video"],
        Kind.AUDIO: stats["n_audio"],
        Kind.IMAGE: stats["n_image"],
    }
    assert keep_count(layout.num_av, case["compression_ratio"]) == stats["k"]


def test_a_rate_that_went_through_float32_gives_the_same_layout() -> None:
    """Processors hand the rate on as a float32 tensor: 2 / 3 arrives as 0.6666666865."""
    _, tensors = load_case("aiv_a_fps3_r020")
    tokens = checkpoint_tokens()
    prompt = [tokens.vision_bos, tokens.video, tokens.vision_eos]
    rates = [2 / 3, tensors["proc.video_second_per_grid"].item()]
    one, other = (build_layout(prompt, [Video((60, 2, 2), rate, 1000)], tokens) for rate in rates)
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    np.testing.assert_array_equal(one.positions, other.positions)


def test_every_slot_of_two_clips_with_sound_is_found() -> None:
    _, tensors = load_case("aiv_a_then_aiv_b_r020")
    layout = layout_of("aiv_a_then_aiv_b_r020")
    grids = tensors["proc.video_grid_thw"].tolist()
    frames = tensors["proc.feature_lengths"].tolist()
    for index, (grid, mel_frames) in enumerate(zip(grids, frames, strict=True)):
        assert layout.slots(index, Kind.VIDEO).size == video_tokens(tuple(grid), 2)
        assert layout.slots(index, Kind.AUDIO).size == audio_token_count(mel_frames)
