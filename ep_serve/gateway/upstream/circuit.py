"""The circuit breaker of one engine."""

from __future__ import annotations

import enum
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ep_serve.gateway.settings import RoutingSettings


class Outcome(enum.Enum):
    """What a request says about its engine."""

    ANSWERED = enum.auto()
    FAILED = enum.auto()
    """It failed, which the request itself may have caused."""
    SILENT = enum.auto()
    """The engine could not be reached, or answered nobody for as long as requests may take."""


class Circuit:
    """Opens when an engine is silent several times in a row, or fails a trial request.

    A trial request is the gateway's own. What clients send can make an engine fail, so their
    failures do not open the circuit, they only cause a trial. An answer closes it; a health check
    does not, because a server may answer it while the engine behind it hangs.
    """

    def __init__(self, settings: RoutingSettings) -> None:
        self.open = False
        self._settings = settings
        self._failures = 0
        self._silences = 0
        self._next_trial = 0.0

    @property
    def needs_trial(self) -> bool:
        """Whether a trial request is due."""
        suspect = self.open or self._failures >= self._settings.breaker_failures
        return suspect and time.monotonic() >= self._next_trial

    def count(self, outcome: Outcome) -> None:
        """Count a request."""
        if outcome is Outcome.ANSWERED:
            self._close()
        elif outcome is Outcome.FAILED:
            self._failures += 1
        else:
            self._silences += 1
            self.open = self.open or self._silences >= self._settings.breaker_failures

    def tried(self, works: bool | None) -> None:
        """Note the end of a trial; None if it was not conclusive."""
        self._next_trial = time.monotonic() + self._settings.breaker_reset_s
        if works:
            self._close()
        elif works is not None:
            self.open = True

    def hurry(self) -> None:
        """Let the next trial begin at once."""
        self._next_trial = 0.0

    def _close(self) -> None:
        self.open = False
        self._failures = self._silences = 0
