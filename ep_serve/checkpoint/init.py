"""Make an EchoingPixels checkpoint from a stock Qwen2.5-Omni one, as a start for training.

As the authors do, the refiner starts as a copy of the first decoder layers; only the score head is
new. Tensors are copied in small pieces, so the size of the model does not matter.
"""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep_serve.checkpoint import names
from ep_serve.checkpoint.config import (
    ARCHITECTURE,
    MODEL_TYPE,
    STOCK_MODEL_TYPE,
    THINKER_MODEL_TYPE,
    Qwen2_5OmniCompressConfig,
    ReductionConfig,
    parse_config,
    text_config,
)
from ep_serve.checkpoint.directory import new_directory, read_json, write_json
from ep_serve.checkpoint.errors import CheckpointError
from ep_serve.checkpoint.random_weights import random_tensor
from ep_serve.checkpoint.tensors import (
    SHARD_BYTES,
    NewTensor,
    Shape,
    StoredTensor,
    Tensor,
    read_tensors,
    write_tensors,
)

SCORE_HEAD_STD = 0.02  # `initializer_range` of Qwen2.5-Omni
COPIED_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "LICENSE",
)


@dataclass(frozen=True, slots=True)
class Made:
    """What `init` wrote, and how many tensors it left out, by the first part of their names."""

    directory: Path
    tensors: int
    nbytes: int
    left_out: Mapping[str, int]


def init(
    source: Path,
    target: Path,
    *,
    layers: int = 4,
    keep_ratio: float = 0.2,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> Made:
    """Write an untrained EchoingPixels checkpoint made from `source` to `target`.

    layers: refiner layers, at most as many as the decoder has.
    keep_ratio: the `compression_ratio` written to the configuration.
    seed: of the score head's first weights.
    shard_bytes: the most one file of weights may hold, except for a single larger tensor.

    `target` appears when it is complete, or not at all.

    Raises:
        CheckpointError: `source` is not a complete stock Qwen2.5-Omni checkpoint, `target` exists
            and is not empty, or `layers` or `keep_ratio` are out of range.
    """
    data = _new_config(_stock_config(source), layers, keep_ratio)
    config = parse_config(data)
    ReductionConfig.from_hf(config)
    depth = text_config(config).num_hidden_layers
    if layers > depth:
        raise CheckpointError(
            f"layers must be at most {depth}, the number of decoder layers, but it is {layers}"
        )
    stored = read_tensors(source)
    tensors = _tensors(stored, config, layers, seed)
    with new_directory(target) as directory:
        for file in COPIED_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, directory / file)
        write_json(directory / "config.json", data)
        write_tensors(directory, tensors, shard_bytes)
    return Made(
        directory=target,
        tensors=len(tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
        left_out=Counter(name.split(".")[0] for name in stored.keys() - tensors.keys()),
    )


def _stock_config(source: Path) -> dict[str, Any]:
    data = read_json(source / "config.json")
    model_type = data.get("model_type")
    if model_type == MODEL_TYPE:
        raise CheckpointError(f"{source} already is an EchoingPixels checkpoint")
    if model_type != STOCK_MODEL_TYPE or not isinstance(data.get("thinker_config"), dict):
        raise CheckpointError(
            f"{source} is not a Qwen2.5-Omni checkpoint: its model_type is {model_type!r}"
        )
    return data


def _new_config(stock: dict[str, Any], layers: int, keep_ratio: float) -> dict[str, Any]:
    data = copy.deepcopy(stock)
    for voice in ("talker_config", "token2wav_config"):
        data.pop(voice, None)
    data |= {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "enable_audio_output": False,
    }
    thinker = data["thinker_config"]
    thinker["model_type"] = THINKER_MODEL_TYPE
    thinker.pop("architectures", None)
    text = thinker.setdefault("text_config", {})
    text |= {"av_refiner_layers": layers, "compression_ratio": keep_ratio}
    return data


def _tensors(
    stored: dict[str, StoredTensor], config: Qwen2_5OmniCompressConfig, layers: int, seed: int
) -> dict[str, Tensor]:
    stock = names.stock_shapes(config)
    for name, shape in stock.items():
        if name not in stored:
            raise CheckpointError(f"the source lacks the tensor {name}")
        if stored[name].shape != shape:
            raise CheckpointError(
                f"{name} must have the shape {list(shape)} according to config.json, but it has "
                f"{list(stored[name].shape)}"
            )
    tensors: dict[str, Tensor] = {name: stored[name] for name in stock}
    for name, origin in names.refiner_sources(stock, layers).items():
        tensors[name] = stored[origin]
    dtype = stored[names.EMBEDDING].dtype
    for name, shape in names.compressor_shapes(text_config(config).hidden_size).items():
        tensors[name] = _score_head_tensor(name, shape, dtype, seed)
    return tensors


def _score_head_tensor(name: str, shape: Shape, dtype: str, seed: int) -> NewTensor:
    values = random_tensor(name, shape, SCORE_HEAD_STD, seed)
    if name.endswith("ln.weight"):
        values.fill_(1.0)
    elif name.endswith("bias"):
        values.zero_()
    return NewTensor.of(values, dtype)
