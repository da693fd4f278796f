"""A checkpoint of this project and a stock one, both tiny and both made here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ep_serve.checkpoint import names
from ep_serve.checkpoint.directory import read_json, write_json
from ep_serve.checkpoint.embedded import build
from ep_serve.checkpoint.tensors import NewTensor, Tensor, read_tensors, write_tensors

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("embedded") / "model")


@pytest.fixture(scope="session")
def stock(embedded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint as Qwen2.5-Omni would have it: no reduction, but a voice."""
    directory = tmp_path_factory.mktemp("stock")
    for file in embedded.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            shutil.copy(file, directory)
    (directory / "spk_dict.pt").write_bytes(b"speakers")
    data = read_json(embedded / "config.json")
    data["architectures"] = ["Qwen2_5OmniForConditionalGeneration"]
    data["model_type"] = "qwen2_5_omni"
    data["talker_config"] = {"model_type": "qwen2_5_omni_talker"}
    data["thinker_config"]["model_type"] = "qwen2_5_omni_thinker"
    for key in ("av_refiner_layers", "compression_ratio"):
        del data["thinker_config"]["text_config"][key]
    write_json(directory / "config.json", data)
    tensors: dict[str, Tensor] = {
        name: tensor
        for name, tensor in read_tensors(embedded).items()
        if not name.startswith((names.REFINER_LAYERS, names.COMPRESSOR))
    }
    voice = NewTensor.of(torch.zeros(3), "F32")
    tensors |= {"talker.a.weight": voice, "talker.b.weight": voice, "token2wav.c.weight": voice}
    write_tensors(directory, tensors, shard_bytes=2 << 20)
    return directory


@pytest.fixture
def copied(embedded: Path, tmp_path: Path) -> Path:
    """A copy of the embedded checkpoint, to be spoiled."""
    directory = tmp_path / "copied"
    shutil.copytree(embedded, directory)
    return directory


def edit_json(path: Path, edit: Edit) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
