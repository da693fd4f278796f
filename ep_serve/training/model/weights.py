"""Read and write weights in the official checkpoint layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ep_serve.checkpoint import names
from ep_serve.checkpoint.config import load_config, parse_config, text_config
from ep_serve.checkpoint.errors import CheckpointError
from ep_serve.checkpoint.tensors import NewTensor, read_tensors, write_tensors
from ep_serve.training.model.thinker import Thinker

TOWERS = {"visual": "thinker.visual.", "audio_tower": "thinker.audio_tower."}


def load_thinker(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Thinker:
    """Load the thinker of an EchoingPixels checkpoint; `options` are those of `Thinker`.

    Raises:
        CheckpointError: The directory is no such checkpoint, or lacks a tensor.
    """
    with torch.device("meta"):
        thinker = Thinker(load_config(directory), **options)
    wanted = {names.THINKER + name for name in thinker.state_dict()}
    found = read_named(directory, wanted)
    if missing := sorted(wanted - found.keys() - {names.OUTPUT}):
        raise CheckpointError(f"{directory} holds no {missing[0]} ({len(missing)} are missing)")
    if names.OUTPUT in wanted:
        found.setdefault(names.OUTPUT, found[names.EMBEDDING])
    state = {name.removeprefix(names.THINKER): value.to(dtype) for name, value in found.items()}
    thinker.load_state_dict(state, assign=True)
    if text_config(load_config(directory)).tie_word_embeddings:
        thinker.lm_head.weight = thinker.model.embed_tokens.weight
    return thinker


def read_named(directory: Path, wanted: set[str]) -> dict[str, Tensor]:
    """Read the tensors with these names that a checkpoint has."""
    stored = {name: t.path for name, t in read_tensors(directory).items() if name in wanted}
    found = {}
    for path in sorted(set(stored.values())):
        with safe_open(path, framework="pt") as file:
            for name, place in stored.items():
                if place == path:
                    found[name] = file.get_tensor(name)
    return found


def write_weights(
    directory: Path,
    config: Mapping[str, Any],
    thinker: Mapping[str, Tensor],
    towers: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Write model.safetensors in bfloat16.

    Args:
        directory: Target directory.
        config: The content of config.json.
        thinker: State of a `Thinker`.
        towers: States of "visual" and "audio_tower".

    Raises:
        CheckpointError: The names or shapes are not those that the configuration promises.
    """
    weights = {names.THINKER + name: value for name, value in thinker.items()}
    for tower, prefix in TOWERS.items():
        weights |= {prefix + name: value for name, value in towers[tower].items()}
    parsed = parse_config(dict(config))
    expected = names.expected_shapes(parsed, text_config(parsed).av_refiner_layers)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    if shapes != expected:
        odd = sorted(shapes.items() ^ expected.items())[0][0]
        raise CheckpointError(f"tensor {odd} does not match the configuration")
    write_tensors(
        directory, {name: NewTensor.of(weights[name], "BF16") for name in sorted(weights)}
    )
