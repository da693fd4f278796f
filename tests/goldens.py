"""Access to the reference numbers in the folder `shared/goldens` beside the checkout.

The folder is looked up in `EP_SERVE_GOLDENS`, then beside the checkout. Tests that need it skip,
with the reason, where it is absent.
"""

from __future__ import annotations

import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(
    os.environ.get("EP_SERVE_GOLDENS", Path(__file__).parents[2] / "shared" / "goldens")
).resolve()
GOLDENS = ROOT / "echoingpixels"
OMNISIFT = ROOT / "omnisift"
CHECKPOINT = GOLDENS / "checkpoint"
CLIPS = GOLDENS / "clips"

needs_goldens = pytest.mark.skipif(
    not GOLDENS.is_dir(), reason=f"the reference numbers are not at {ROOT}"
)

CASES: list[str] = (
    json.loads((GOLDENS / "manifest.json").read_text())["cases"] if GOLDENS.is_dir() else []
)


@cache
def load_case(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The JSON and the tensors of one EchoingPixels case."""
    spec = importlib.util.spec_from_file_location("golden_loader", ROOT / "load_case.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data: tuple[dict[str, Any], dict[str, torch.Tensor]] = module.load_case(str(GOLDENS), name)
    return data
