from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Qwen2_5OmniConfig

from ep_serve.checkpoint.config import (
    Qwen2_5OmniCompressConfig,
    Qwen2_5OmniCompressThinkerConfig,
    ReductionConfig,
    load_config,
    parse_config,
    register_config,
)
from ep_serve.checkpoint.directory import read_json
from ep_serve.checkpoint.embedded import CONFIG
from ep_serve.checkpoint.errors import CheckpointError
from tests.goldens import CHECKPOINT, needs_goldens

MISSING = object()


def config_with(**text: Any) -> Qwen2_5OmniCompressConfig:
    data = copy.deepcopy(CONFIG)
    for key, value in text.items():
        data["thinker_config"]["text_config"].pop(key, None)
        if value is not MISSING:
            data["thinker_config"]["text_config"][key] = value
    return parse_config(data)


@needs_goldens
def test_the_official_config_survives_loading() -> None:
    config = load_config(CHECKPOINT)
    thinker = config.thinker_config
    text = thinker.text_config
    assert isinstance(config, Qwen2_5OmniConfig)
    assert isinstance(thinker, Qwen2_5OmniCompressThinkerConfig)
    assert config.dtype == torch.float32
    assert config.architectures == ["Qwen2_5OmniCompressForConditionalGeneration"]
    assert text.rope_parameters["rope_theta"] == 1000000.0
    assert text.rope_parameters["mrope_section"] == [16, 24, 24]
    assert text.rope_parameters["rope_type"] == "default"
    assert not text.tie_word_embeddings
    tokens = (thinker.audio_token_index, thinker.image_token_index, thinker.video_token_index)
    assert tokens == (502, 508, 509)
    assert (thinker.audio_token_id, thinker.image_token_id, thinker.video_token_id) == tokens
    assert (thinker.vision_start_token_id, thinker.vision_end_token_id) == (505, 506)
    assert (thinker.audio_start_token_id, thinker.audio_end_token_id) == (503, 504)
    assert (thinker.position_id_per_seconds, thinker.seconds_per_chunk) == (25, 2)
    assert (thinker.vision_config.depth, thinker.audio_config.encoder_layers) == (2, 2)


@needs_goldens
def test_the_official_reduction_is_read() -> None:
    expected = ReductionConfig(2, 0.2, (18, 18, 18, 10))
    assert ReductionConfig.from_hf(load_config(CHECKPOINT)) == expected


@needs_goldens
def test_a_config_without_a_voice_loads_like_one_with_it() -> None:
    data = read_json(CHECKPOINT / "config.json")
    whole = parse_config(data)
    del data["talker_config"], data["token2wav_config"]
    assert parse_config(data).thinker_config.to_dict() == whole.thinker_config.to_dict()


def test_auto_config_knows_the_checkpoint(embedded: Path) -> None:
    register_config()
    register_config()
    config = AutoConfig.from_pretrained(embedded)
    assert isinstance(config, Qwen2_5OmniCompressConfig)
    assert config.dtype == torch.bfloat16


def test_a_saved_config_loads_as_it_was(tmp_path: Path) -> None:
    config = config_with(sync_rope_section=[8, 8, 8, 8])
    config.save_pretrained(tmp_path)
    assert load_config(tmp_path).thinker_config.to_dict() == config.thinker_config.to_dict()


def test_a_silent_text_config_means_what_it_meant_to_transformers_4() -> None:
    text = config_with(tie_word_embeddings=MISSING, rope_scaling=MISSING).thinker_config.text_config
    assert not text.tie_word_embeddings
    assert text.rope_parameters["mrope_section"] == [16, 24, 24]


def test_rope_parameters_of_transformers_5_are_kept() -> None:
    rope = {"mrope_section": [8, 12, 12], "rope_theta": 5.0, "rope_type": "default"}
    config = config_with(rope_scaling=MISSING, rope_theta=MISSING, rope_parameters=rope)
    assert config.thinker_config.text_config.rope_parameters == rope


def test_sections_default_to_the_scaled_ones() -> None:
    assert ReductionConfig.from_hf(config_with()).sync_rope_sections == (9, 9, 9, 5)


def test_the_config_may_override_the_sections() -> None:
    config = config_with(sync_rope_section=[8, 8, 8, 8])
    assert ReductionConfig.from_hf(config).sync_rope_sections == (8, 8, 8, 8)


def test_the_reduction_can_be_read_from_any_level() -> None:
    config = config_with()
    whole = ReductionConfig.from_hf(config)
    assert ReductionConfig.from_hf(config.thinker_config) == whole
    assert ReductionConfig.from_hf(config.thinker_config.text_config) == whole


def test_keeping_everything_is_allowed() -> None:
    assert ReductionConfig.from_hf(config_with(compression_ratio=1)).keep_ratio == 1.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("av_refiner_layers", MISSING),
        ("av_refiner_layers", 0),
        ("av_refiner_layers", "4"),
        ("av_refiner_layers", True),
        ("compression_ratio", MISSING),
        ("compression_ratio", 0),
        ("compression_ratio", 1.01),
        ("compression_ratio", -0.2),
        ("compression_ratio", float("nan")),
        ("compression_ratio", "0.2"),
        ("compression_ratio", True),
        ("sync_rope_section", [9, 9, 9]),
        ("sync_rope_section", [9, 9, 9, 6]),
        ("sync_rope_section", [20, 20, -9, 1]),
        ("sync_rope_section", [9, 9, 9, 4, 1]),
        ("sync_rope_section", "9995"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as caught:
        ReductionConfig.from_hf(config_with(**{key: value}))
    message = str(caught.value)
    assert message.startswith(f"{key} in thinker_config.text_config must be ")
    assert ("is missing" if value is MISSING else repr(value)) in message
    assert "\n" not in message


def test_a_hidden_size_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"hidden_size 256 is not a multiple of .* 3"):
        ReductionConfig.from_hf(config_with(num_attention_heads=3))


def test_a_config_that_transformers_refuses_is_refused_in_one_line() -> None:
    with pytest.raises(CheckpointError, match="refused by transformers") as caught:
        config_with(hidden_size="wide")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"model_type": "llama"}', "must be 'qwen2_5_omni_compress', but it is 'llama'"),
        ('{"model_type": "qwen2_5_omni"}', "ep-serve checkpoint init"),
        ("[]", "must hold a JSON object, not list"),
        ("{", "cannot be read"),
    ],
)
def test_a_config_of_something_else_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_config(tmp_path)


def test_a_directory_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        load_config(tmp_path / "absent")
