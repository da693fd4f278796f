"""The circuit breaker of one engine."""

from __future__ import annotations

import enum
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ep_serve.gateway.settings import RoutingSettings


class Outcome(enum.Enum):
    """The result of a request, as far as it tells something about the engine."""

    SUCCEEDED = enum.auto()
    FAILED = enum.auto()
    """The request failed, perhaps because of its own content."""
    UNRESPONSIVE = enum.auto()
    """The connection was refused, or the engine sent nothing to any client within the timeout."""


class Circuit:
    """Opens after several unresponsive requests in a row, or after a failed trial request.

    A trial request is sent by the gateway itself. The content of client requests can make an engine
    fail, so their failures only trigger a trial. A successful request closes the circuit; a health
    check does not, because a server may answer it while the engine behind it hangs.
    """

    def __init__(self, settings: RoutingSettings) -> None:
        self.is_open = False
        self._settings = settings
        self._failures = 0
        self._timeouts = 0
        self._next_trial = 0.0

    @property
    def needs_trial(self) -> bool:
        """Whether a trial request is due."""
        suspect = self.is_open or self._failures >= self._settings.breaker_failures
        return suspect and time.monotonic() >= self._next_trial

    def record(self, outcome: Outcome) -> None:
        """Record the outcome of a request."""
        if outcome is Outcome.SUCCEEDED:
            self._close()
        elif outcome is Outcome.FAILED:
            self._failures += 1
        else:
            self._timeouts += 1
            self.is_open = self.is_open or self._timeouts >= self._settings.breaker_failures

    def record_trial(self, works: bool | None) -> None:
        """Record the result of a trial request; None if it was inconclusive."""
        self._next_trial = time.monotonic() + self._settings.breaker_reset_s
        if works:
            self._close()
        elif works is not None:
            self.is_open = True

    def allow_trial(self) -> None:
        """Make the next trial due at once."""
        self._next_trial = 0.0

    def _close(self) -> None:
        self.is_open = False
        self._failures = self._timeouts = 0
