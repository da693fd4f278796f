"""Which of the checkpoints that can be served lies in a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ep_serve.checkpoint.config import MODEL_TYPE, STOCK_MODEL_TYPE
from ep_serve.checkpoint.directory import read_json
from ep_serve.checkpoint.errors import CheckpointError
from ep_serve.checkpoint.tensors import read_tensors

Kind = Literal["echoingpixels", "omnisift", "stock"]

OMNISIFT_PREFIX = "thinker.compressor."


def kind_of(directory: Path) -> Kind:
    """Identify a checkpoint by its configuration and the names of its tensors.

    An OmniSIFT checkpoint has the configuration of a stock Qwen2.5-Omni one: only its extra
    tensors tell it apart.

    Raises:
        CheckpointError: it is neither, or a file is missing or cannot be read.
    """
    model_type = read_json(directory / "config.json").get("model_type")
    if model_type == MODEL_TYPE:
        return "echoingpixels"
    if model_type != STOCK_MODEL_TYPE:
        raise CheckpointError(
            f"{directory} is not a Qwen2.5-Omni checkpoint: its model_type is {model_type!r}"
        )
    if any(name.startswith(OMNISIFT_PREFIX) for name in read_tensors(directory)):
        return "omnisift"
    return "stock"
