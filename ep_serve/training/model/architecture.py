"""Configuration of the embedded model: a thousandth of Qwen2.5-Omni's thinker, with CS2."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from ep_serve.checkpoint.config import MEDIA_DEFAULTS
from ep_serve.checkpoint.directory import write_json
from ep_serve.checkpoint.embedded import (
    AUDIO_CONFIG,
    CONFIG,
    GENERATION_CONFIG,
    TEXT_CONFIG,
    VISION_CONFIG,
)
from ep_serve.checkpoint.embedded_text import (
    vocabulary_size,
    write_processor_files,
    write_text_files,
)
from ep_serve.scenes import questions

HIDDEN = 256
BOUNDS = (9 * 28 * 28, 9 * 28 * 28)
"""Least and most pixels of a frame: about nine tokens."""
VOCABULARY = (
    *questions.vocabulary(),
    *("system", "user", "assistant", "You", " helpful", " assistant"),  # the chat template's
)
"""Words that are one token each."""


def config() -> dict[str, Any]:
    """The content of config.json."""
    text = TEXT_CONFIG | {
        "hidden_size": HIDDEN,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "av_refiner_layers": 3,
        "vocab_size": vocabulary_size(VOCABULARY),
    }
    vision = VISION_CONFIG | {
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_heads": 3,
        "out_hidden_size": HIDDEN,
    }
    audio = AUDIO_CONFIG | {
        "d_model": 96,
        "encoder_attention_heads": 3,
        "encoder_ffn_dim": 192,
        "output_dim": HIDDEN,
    }
    parts = {"text_config": text, "vision_config": vision, "audio_config": audio}
    low, high = BOUNDS
    whole = CONFIG | {
        MEDIA_DEFAULTS: {"min_pixels": low, "max_pixels": high},
        "thinker_config": CONFIG["thinker_config"] | parts,
    }
    return deepcopy(whole)  # transformers modifies the dictionaries it is passed


def write_config_files(directory: Path) -> None:
    """Write all files of the checkpoint but its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config())
    write_json(directory / "generation_config.json", GENERATION_CONFIG)
    write_text_files(directory, VOCABULARY)
    write_processor_files(directory, *BOUNDS)
