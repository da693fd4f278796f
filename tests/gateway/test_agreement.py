"""What the gateway says twice because it may not import the other rooms."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from ep_serve.gateway.chat_request import OwnFields
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


def test_the_request_fields_are_the_engines() -> None:
    tree = ast.parse((ROOMS / "engine" / "settings.py").read_text())
    options = next(
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "RequestOptions"
    )
    names = {
        node.target.id
        for node in options.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    sound = assigned("engine/settings.py", "SOUND_FIELD")
    assert {*names, sound} - {"sound"} == set(OwnFields.model_fields)


def test_whatever_the_engine_decodes_is_let_through() -> None:
    codecs = probe_file.VIDEO_CODECS | probe_file.AUDIO_CODECS
    assert set(assigned("media/containers.py", "DECODERS")) <= codecs
    assert set(assigned("media/containers.py", "DEMUXERS")) <= set(probe_file.DEMUXERS)
