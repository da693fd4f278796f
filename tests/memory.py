"""What the kernel says about the memory of a process, in bytes."""

from __future__ import annotations

import os
from pathlib import Path


def resident(pid: int | None = None) -> int:
    """The memory that a process has now; this one by default."""
    return _status("VmRSS", pid)


def peak(pid: int | None = None) -> int:
    """The most memory that a process had since it started, or since `reset_peak`."""
    return _status("VmHWM", pid)


def reset_peak(pid: int | None = None) -> None:
    _folder(pid).joinpath("clear_refs").write_text("5")


def _status(name: str, pid: int | None) -> int:
    status = _folder(pid).joinpath("status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


def _folder(pid: int | None) -> Path:
    return Path("/proc", str(pid or os.getpid()))
