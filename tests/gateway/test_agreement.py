"""What the gateway says twice because it may not import the other rooms."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from ep_serve.gateway.media import probe_file

ROOMS = Path(__file__).resolve().parents[2] / "ep_serve"


def assigned(file: str, name: str) -> Any:
    """The literal that a module assigns to a name, read without importing the module."""
    for node in ast.parse((ROOMS / file).read_text()).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            code = compile(ast.Expression(node.value), file, "eval")
            return eval(code, {"__builtins__": {}})  # a literal with unpacked tuples in it
    raise LookupError(f"{file} assigns no {name}")


def test_whatever_the_engine_decodes_is_let_through() -> None:
    codecs = probe_file.VIDEO_CODECS | probe_file.AUDIO_CODECS
    assert set(assigned("media/containers.py", "DECODERS")) <= codecs
    assert set(assigned("media/containers.py", "DEMUXERS")) <= set(probe_file.DEMUXERS)
