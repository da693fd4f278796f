"""One line on the terminal that says what is going on."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

WIDTH = 24


@dataclass
class Progress:
    """Rewrites its line on a terminal; elsewhere only `say` prints.

    Attributes:
        total: steps of the whole test.
        out: where to write.
    """

    total: int = 0
    done: int = 0
    out: TextIO = field(default_factory=lambda: sys.stderr)
    began: float = field(default_factory=time.monotonic)

    def note(self, text: str) -> None:
        """Something that will be overwritten."""
        if self.out.isatty():
            self.out.write(f"\r\x1b[2K{self._bar()} {text}")
            self.out.flush()

    def say(self, text: str) -> None:
        """Something to keep."""
        start = "\r\x1b[2K" if self.out.isatty() else ""
        self.out.write(f"{start}{text}\n")
        self.out.flush()

    def step(self, text: str) -> None:
        """A step is done."""
        self.done += 1
        self.say(f"{self._bar()} {text}")

    def _bar(self) -> str:
        share = self.done / self.total if self.total else 0.0
        filled = round(WIDTH * min(1.0, share))
        minutes, seconds = divmod(int(time.monotonic() - self.began), 60)
        bar = "#" * filled + "." * (WIDTH - filled)
        return f"[{bar}] {self.done}/{self.total} {minutes}:{seconds:02}"
