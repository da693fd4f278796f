"""A tiny EchoingPixels checkpoint, made from nothing in a second.

It has the official layout and random weights: its answers mean nothing, but everything around the
answers (loading, expansion, reduction, streaming, tensor parallelism over two) works as with a real
one. 4.2 million parameters, 8 MB.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from ep_serve.checkpoint import names
from ep_serve.checkpoint.config import (
    ARCHITECTURE,
    MODEL_TYPE,
    THINKER_MODEL_TYPE,
    parse_config,
)
from ep_serve.checkpoint.directory import new_directory, write_json
from ep_serve.checkpoint.embedded_text import (
    LONGEST_TEXT,
    READABLE,
    TOKEN_IDS,
    write_processor_files,
    write_text_files,
)
from ep_serve.checkpoint.random_weights import random_tensor
from ep_serve.checkpoint.tensors import NewTensor, Shape, write_tensors

HIDDEN = 256
REFINER_LAYERS = 2
BIAS_STD = 0.02
LOGIT_STD = 3.0  # wide enough that bfloat16 rarely confuses the two best tokens
SCORE_STD = 4.0  # likewise for the scores of neighbouring AV tokens

TEXT_CONFIG: dict[str, Any] = {
    "av_refiner_layers": REFINER_LAYERS,
    "compression_ratio": 0.2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "intermediate_size": 512,
    "max_position_embeddings": LONGEST_TEXT,
    "model_type": "qwen2_5_omni_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_section": [8, 12, 12], "rope_type": "default", "type": "default"},
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 320,
}
VISION_CONFIG: dict[str, Any] = {
    "depth": 2,
    "fullatt_block_indexes": [1],
    "hidden_act": "silu",
    "hidden_size": 64,
    "in_channels": 3,
    "in_chans": 3,
    "intermediate_size": 128,
    "model_type": "qwen2_5_omni_vision_encoder",
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "spatial_patch_size": 14,
    "temporal_patch_size": 2,
    "tokens_per_second": 25,
    "window_size": 112,
}
AUDIO_CONFIG: dict[str, Any] = {
    "activation_function": "gelu",
    "d_model": 64,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "encoder_layers": 2,
    "max_source_positions": 1500,
    "model_type": "qwen2_5_omni_audio_encoder",
    "n_window": 100,
    "num_hidden_layers": 2,
    "num_mel_bins": 128,
    "output_dim": HIDDEN,
}
SPECIAL_IDS = {
    "audio_end_token_id": TOKEN_IDS["<|audio_eos|>"],
    "audio_start_token_id": TOKEN_IDS["<|audio_bos|>"],
    "audio_token_index": TOKEN_IDS["<|AUDIO|>"],
    "bos_token_id": TOKEN_IDS["<|im_start|>"],
    "eos_token_id": TOKEN_IDS["<|im_end|>"],
    "image_token_index": TOKEN_IDS["<|IMAGE|>"],
    "pad_token_id": TOKEN_IDS["<|endoftext|>"],
    "video_token_index": TOKEN_IDS["<|VIDEO|>"],
    "vision_end_token_id": TOKEN_IDS["<|vision_eos|>"],
    "vision_start_token_id": TOKEN_IDS["<|vision_bos|>"],
    "vision_token_id": TOKEN_IDS["<|vision_pad|>"],
}
CONFIG: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "dtype": "bfloat16",
    "enable_audio_output": False,
    "model_type": MODEL_TYPE,
    "thinker_config": {
        "audio_config": AUDIO_CONFIG,
        **SPECIAL_IDS,
        "model_type": THINKER_MODEL_TYPE,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "text_config": TEXT_CONFIG,
        "tie_word_embeddings": False,
        "vision_config": VISION_CONFIG,
    },
    "tie_word_embeddings": False,
}
GENERATION_CONFIG = {
    "bos_token_id": TOKEN_IDS["<|im_start|>"],
    "do_sample": False,
    "eos_token_id": [TOKEN_IDS["<|im_end|>"], TOKEN_IDS["<|endoftext|>"]],
    "pad_token_id": TOKEN_IDS["<|endoftext|>"],
}


def build(directory: Path, seed: int = 0) -> Path:
    """Write the embedded checkpoint and return `directory`; one seed always gives the same bytes.

    Raises:
        CheckpointError: `directory` exists and is not empty.
    """
    shapes = names.expected_shapes(parse_config(CONFIG), REFINER_LAYERS)
    weights = {
        name: NewTensor.of(_weight(name, shape, seed), "BF16")
        for name, shape in sorted(shapes.items())
    }
    with new_directory(directory) as new:
        write_json(new / "config.json", CONFIG)
        write_json(new / "generation_config.json", GENERATION_CONFIG)
        write_text_files(new)
        write_processor_files(new)
        write_tensors(new, weights)
    return directory


def _weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """Weights that keep activations near 1 from end to end."""
    if name.endswith(".bias"):
        return random_tensor(name, shape, BIAS_STD, seed)
    if len(shape) == 1:
        return torch.ones(shape)
    if name == names.EMBEDDING:
        return random_tensor(name, shape, 1.0, seed)
    per_input = 1 / math.sqrt(math.prod(shape[1:]))
    if name == names.OUTPUT:
        # Other tokens keep a logit of 0, far below the best: greedy answers are readable text and
        # never stop before their length limit.
        rows = torch.zeros(shape)
        rows[READABLE] = random_tensor(name, shape, LOGIT_STD * per_input, seed)[READABLE]
        return rows
    gain = SCORE_STD if name == names.COMPRESSOR + "score_head.2.weight" else 1.0
    return random_tensor(name, shape, gain * per_input, seed)
