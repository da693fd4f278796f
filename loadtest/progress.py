"""Progress line on the terminal."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

WIDTH = 24


@dataclass
class Progress:
    """Rewrites its line on a terminal; otherwise only permanent lines are printed.

    Attributes:
        total: steps of the whole test.
        out: where to write.
    """

    total: int = 0
    done: int = 0
    out: TextIO = field(default_factory=lambda: sys.stderr)
    began: float = field(default_factory=time.monotonic)

    def show_status(self, text: str) -> None:
        """Show a status, overwritten by the next one."""
        if self.out.isatty():
            self.out.write(f"\r\x1b[2K{self._bar()} {text}")
            self.out.flush()

    def print_line(self, text: str) -> None:
        """Print a permanent line."""
        start = "\r\x1b[2K" if self.out.isatty() else ""
        self.out.write(f"{start}{text}\n")
        self.out.flush()

    def step(self, text: str) -> None:
        """Count a finished step and print a line."""
        self.done += 1
        self.print_line(f"{self._bar()} {text}")

    def _bar(self) -> str:
        share = self.done / self.total if self.total else 0.0
        filled = round(WIDTH * min(1.0, share))
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        bar = "#" * filled + "." * (WIDTH - filled)
        return f"[{bar}] {self.done}/{self.total} {minutes}:{seconds:02}"
