"""Checkpoints of other kinds, made of the weights that are there."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

OURS = ("thinker.model.bidir_encoder.", "thinker.model.compressor.")


def make_stock(source: Path, target: Path, extra: dict[str, torch.Tensor] | None = None) -> Path:
    """The weights of an EchoingPixels checkpoint as a stock Qwen2.5-Omni one.

    Args:
        source: the checkpoint whose towers and decoder are taken.
        target: directory to make.
        extra: tensors to add, such as those of OmniSIFT's selector.
    """
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["Qwen2_5OmniForConditionalGeneration"]
    config["model_type"] = "qwen2_5_omni"
    config["thinker_config"]["model_type"] = "qwen2_5_omni_thinker"
    (target / "config.json").write_text(json.dumps(config))
    tensors = load_file(next(source.glob("*.safetensors")))
    kept = {name: value for name, value in tensors.items() if not name.startswith(OURS)}
    save_file({**kept, **(extra or {})}, target / "model.safetensors", metadata={"format": "pt"})
    return target
