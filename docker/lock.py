"""Write the locked requirements of the images, with hashes: `python docker/lock.py`; needs uv.

`gateway.txt` and `engine-cpu.txt` are whole environments, `build.txt` makes the wheel, `engine.txt`
is what the GPU image adds to vLLM's own environment.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "docker" / "locks"
PYTHON = "3.11"
OPTIONS = ("--quiet", "--generate-hashes", "--no-annotate", "--no-header", "--universal")
ADDED_TO_VLLM = ("av",)
"""Of the extra `engine`, the packages that vLLM's image lacks or may lack."""


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    engine = project["project"]["optional-dependencies"]["engine"]
    added = [line for line in engine if line.split(">")[0] in ADDED_TO_VLLM]
    compile_lock("gateway", "pyproject.toml", "--extra=gateway", "--extra=tracing")
    linux = ("--no-universal", "--python-platform=x86_64-manylinux_2_28")
    compile_lock("engine-cpu", "pyproject.toml", "--extra=cpu", *linux)
    compile_lock("engine", "-", requirements=added)
    compile_lock("build", "-", requirements=project["build-system"]["requires"])
    return 0


def compile_lock(name: str, *arguments: str, requirements: list[str] | None = None) -> None:
    """Find versions that fit and write them with the hashes of their files.

    UV_FIND_LINKS or UV_EXTRA_INDEX_URL has to lead to PyTorch's CPU wheels.
    """
    command = ("uv", "pip", "compile", *OPTIONS, f"--python-version={PYTHON}", *arguments)
    text = "\n".join(requirements or [])
    done = subprocess.run(
        command, cwd=ROOT, input=text, stdout=subprocess.PIPE, text=True, check=True
    )
    (LOCKS / f"{name}.txt").write_text(done.stdout)
    print(f"wrote {name}.txt")


if __name__ == "__main__":
    sys.exit(main())
