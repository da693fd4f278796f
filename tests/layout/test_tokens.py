from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ep_serve.layout import Kind, MediaTokens
from tests.layout.prompts import TOKENS

CONFIG: dict[str, Any] = {
    "audio_token_index": 502,
    "image_token_index": 508,
    "video_token_index": 509,
    "audio_start_token_id": 503,
    "audio_end_token_id": 504,
    "vision_start_token_id": 505,
    "vision_end_token_id": 506,
    "position_id_per_seconds": 25,
    "seconds_per_chunk": 2,
    "vision_config": {"spatial_merge_size": 2},
}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in CONFIG.items() if name not in names}


def test_a_mapping_is_read() -> None:
    assert MediaTokens.from_config(CONFIG) == TOKENS


def test_an_object_is_read() -> None:
    vision = SimpleNamespace(spatial_merge_size=2)
    config = SimpleNamespace(**{**CONFIG, "vision_config": vision})
    assert MediaTokens.from_config(config) == TOKENS


def test_the_newer_names_of_placeholder_ids_are_read() -> None:
    config = {name.replace("_token_index", "_token_id"): value for name, value in CONFIG.items()}
    assert MediaTokens.from_config(config) == TOKENS


def test_the_vision_pair_comes_from_the_arguments_where_the_config_lacks_it() -> None:
    config = without("vision_start_token_id", "vision_end_token_id")
    assert MediaTokens.from_config(config, vision_bos=505, vision_eos=506) == TOKENS


def test_the_vision_pair_of_the_config_wins_over_the_arguments() -> None:
    assert MediaTokens.from_config(CONFIG, vision_bos=1, vision_eos=2) == TOKENS


def test_a_missing_id_is_named() -> None:
    with pytest.raises(ValueError, match="has no audio_token_index or audio_token_id"):
        MediaTokens.from_config(without("audio_token_index"))


def test_a_value_that_is_no_token_id_is_named() -> None:
    with pytest.raises(ValueError, match="audio_end_token_id must be a token id, not '504'"):
        MediaTokens.from_config({**CONFIG, "audio_end_token_id": "504"})


def test_constants_that_the_config_lacks_are_those_of_qwen() -> None:
    config = without("position_id_per_seconds", "seconds_per_chunk", "vision_config")
    assert MediaTokens.from_config(config) == TOKENS


def test_other_constants_are_read() -> None:
    config = {**CONFIG, "position_id_per_seconds": 50, "vision_config": {"spatial_merge_size": 4}}
    tokens = MediaTokens.from_config(config)
    assert (tokens.position_id_per_seconds, tokens.spatial_merge_size) == (50, 4)


@pytest.mark.parametrize("value", [0, -2, 0.5, "2"])
def test_a_constant_that_is_no_positive_integer_is_named(value: object) -> None:
    with pytest.raises(ValueError, match="seconds_per_chunk must be a positive integer"):
        MediaTokens.from_config({**CONFIG, "seconds_per_chunk": value})


def test_each_kind_has_its_placeholder() -> None:
    kinds = (Kind.AUDIO, Kind.IMAGE, Kind.VIDEO)
    assert [TOKENS.placeholder(kind) for kind in kinds] == [502, 508, 509]
