"""Checkpoints of a realistic shape with random weights, and the same for stock vLLM.

    python -m loadtest.reference DIR                   # DIR/ours and DIR/stock, the reference shape
    python -m loadtest.reference DIR --shape 3b --no-weights    # for --load-format dummy

The reference shape is of the 0.5 B class: hidden 896, 24 layers, 14 heads of 64, 2 kv heads,
4 refiner layers, bfloat16. Its tokenizer, its small vocabulary (320) and its small towers (2 layers
of 64) are those of the embedded checkpoint, so refiner and decoder dominate the work.
The twin in `stock` holds the same weights without refiner and score head, as plain Qwen2.5-Omni.
Equal seeds give equal bytes.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ep_serve.checkpoint import names
from ep_serve.checkpoint.config import STOCK_MODEL_TYPE, parse_config
from ep_serve.checkpoint.directory import new_directory, write_json
from ep_serve.checkpoint.embedded import CONFIG, GENERATION_CONFIG
from ep_serve.checkpoint.embedded_text import (
    LONGEST_TEXT,
    READABLE,
    write_processor_files,
    write_text_files,
)
from ep_serve.checkpoint.random_weights import random_tensor
from ep_serve.checkpoint.tensors import NewTensor, Shape, write_tensors
from loadtest.shapes import REFERENCE, SHAPES, ModelShape

STOCK_ARCHITECTURE = "Qwen2_5OmniForConditionalGeneration"
STOCK_THINKER_TYPE = "qwen2_5_omni_thinker"
BIAS_STD = 0.02
SCORE_STD = 4.0
FULL_ATTENTION = {2: [1], 16: [7, 15], 32: [7, 15, 23, 31]}
"""Vision blocks with full attention, by depth of the tower."""

TOWER_HEADS = {64: (2, 2), 512: (8, 8), 1280: (16, 20)}
"""Heads of the vision and of the audio tower, by width."""

Progress = Callable[[str], None]


def build(
    directory: Path,
    shape: ModelShape = REFERENCE,
    *,
    seed: int = 0,
    weights: bool = True,
    progress: Progress = lambda text: None,
) -> tuple[Path, Path]:
    """Write `directory`/ours and `directory`/stock, unless they exist; returns both.

    Raises:
        CheckpointError: one of them exists without being a checkpoint.
    """
    ours, stock = directory / "ours", directory / "stock"
    config = config_of(shape)
    shapes = names.expected_shapes(parse_config(config), shape.refiner_layers)
    tensors = _random(shapes, seed, progress) if weights and not _exists(ours, stock) else {}
    _write(ours, config, tensors)
    stock_shapes = names.stock_shapes(parse_config(config))
    _write(stock, stock_config(config), {n: t for n, t in tensors.items() if n in stock_shapes})
    return ours, stock


def config_of(shape: ModelShape) -> dict[str, Any]:
    """The embedded checkpoint's configuration with the sizes of `shape`."""
    config = copy.deepcopy(CONFIG)
    thinker = config["thinker_config"]
    half = shape.head_dim // 2
    thinker["text_config"] |= {
        "av_refiner_layers": shape.refiner_layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": LONGEST_TEXT,
        "rope_scaling": {
            "mrope_section": [half // 4, half * 3 // 8, half * 3 // 8],
            "rope_type": "default",
            "type": "default",
        },
    }
    vision, audio = shape.vision, shape.audio
    thinker["vision_config"] |= {
        "depth": vision.layers,
        "fullatt_block_indexes": FULL_ATTENTION[vision.layers],
        "hidden_size": vision.hidden,
        "intermediate_size": vision.intermediate,
        "num_heads": TOWER_HEADS[vision.hidden][0],
        "out_hidden_size": shape.hidden,
    }
    thinker["audio_config"] |= {
        "d_model": audio.hidden,
        "encoder_attention_heads": TOWER_HEADS[audio.hidden][1],
        "encoder_ffn_dim": audio.intermediate,
        "encoder_layers": audio.layers,
        "num_hidden_layers": audio.layers,
        "output_dim": shape.hidden,
    }
    return config


def stock_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same decoder and towers as plain Qwen2.5-Omni."""
    stock = copy.deepcopy(config)
    stock |= {"architectures": [STOCK_ARCHITECTURE], "model_type": STOCK_MODEL_TYPE}
    thinker = stock["thinker_config"]
    thinker["model_type"] = STOCK_THINKER_TYPE
    for key in ("av_refiner_layers", "compression_ratio"):
        thinker["text_config"].pop(key)
    return stock


def _exists(*directories: Path) -> bool:
    return all((directory / "config.json").is_file() for directory in directories)


def _write(directory: Path, config: dict[str, Any], tensors: dict[str, NewTensor]) -> None:
    if _exists(directory):
        return
    with new_directory(directory) as new:
        write_json(new / "config.json", config)
        write_json(new / "generation_config.json", GENERATION_CONFIG)
        write_text_files(new)
        write_processor_files(new)
        if tensors:
            write_tensors(new, tensors)


def _random(shapes: dict[str, Shape], seed: int, progress: Progress) -> dict[str, NewTensor]:
    tensors: dict[str, NewTensor] = {}
    total = sum(math.prod(shape) for shape in shapes.values())
    done = 0
    for name, shape in sorted(shapes.items()):
        tensors[name] = NewTensor.of(_weight(name, shape, seed), "BF16")
        done += math.prod(shape)
        progress(f"random weights {100 * done // total} % of {total / 1e6:.0f} M")
    return tensors


def _weight(name: str, shape: Shape, seed: int) -> torch.Tensor:
    """Weights that keep activations near 1 and predict only readable tokens."""
    if name.endswith(".bias"):
        return random_tensor(name, shape, BIAS_STD, seed)
    if len(shape) == 1:
        return torch.ones(shape)
    if name == names.EMBEDDING:
        return random_tensor(name, shape, 1.0, seed)
    std = 1 / math.sqrt(math.prod(shape[1:]))
    if name == names.OUTPUT:
        rows = torch.zeros(shape)
        rows[READABLE] = random_tensor(name, (len(READABLE), *shape[1:]), 3.0 * std, seed)
        return rows
    if name == names.COMPRESSOR + "score_head.2.weight":
        std *= SCORE_STD
    return random_tensor(name, shape, std, seed)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.reference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="reference")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-weights", action="store_true", help="configurations only")
    args = parser.parse_args()
    ours, stock = build(
        args.directory,
        SHAPES[args.shape],
        seed=args.seed,
        weights=not args.no_weights,
        progress=lambda text: print(f"\r{text}", end="", flush=True),
    )
    print(f"\n{ours}\n{stock}")


if __name__ == "__main__":
    main()
