"""Quarantine request contents that crash engines (poison pills).

All requests of a crashed engine fail, and nothing tells which of them caused the crash, if one did.
So contents are recorded, whoever sends them, with the crashes that they were in flight at:

- content in flight at two crashes that have no other content in common is quarantined;
- content that shares both crashes with others is on trial: it is admitted a few at a time, only
  while another engine is available, and is not retried. A success clears it; a third crash
  quarantines it. Success of the others proves nothing: perhaps no request was the cause;
- content that has succeeded before is quarantined only after a third crash.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from ep_serve.gateway.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ep_serve.gateway.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_ENTRIES = 4_096


@dataclass(slots=True)
class _Record:
    crashes: dict[int, set[bytes]] = field(default_factory=dict)
    """Contents in flight at each crash, by the id of the crash."""
    until: float = 0.0


class Quarantine:
    """Crashes of engines and digests of the contents in flight at them.

    Args:
        seconds: how long a record is kept after its last break.
        metrics: counts quarantined and refused requests.
    """

    def __init__(self, seconds: float, metrics: Metrics) -> None:
        self._seconds = seconds
        self._metrics = metrics
        self._records: OrderedDict[bytes, _Record] = OrderedDict()  # ordered by `until`
        self._crashes: WeakValueDictionary[int, set[bytes]] = WeakValueDictionary()
        self._answered: OrderedDict[bytes, None] = OrderedDict()
        self._trials = 0

    @contextmanager
    def admit(self, content: bytes) -> Iterator[bool]:
        """Admit a request for the block and yield whether it is on trial.

        Raises:
            ApiError: 422 if it is quarantined, 503 if too many are on trial.
        """
        trial = self.check(content)
        if trial and self._trials >= max(1, self._suspects() // 4):
            raise trial_limit_reached()
        self._trials += trial
        try:
            yield trial
        finally:
            self._trials -= trial

    def check(self, content: bytes) -> bool:
        """Return whether a request is on trial.

        Raises:
            ApiError: 422 if it is quarantined.
        """
        self._expire()
        record = self._records.get(content)
        if record is None or len(record.crashes) < 2:
            return False
        shared = set.intersection(*record.crashes.values())
        if len(shared) > 1 or (len(record.crashes) == 2 and content in self._answered):
            return True
        self._metrics.refused.labels("quarantine").inc()
        logger.warning("a quarantined request was refused")
        left = max(1.0, record.until - time.monotonic())
        raise ApiError(
            422,
            f"{len(record.crashes)} engines failed while they processed this request; it is "
            f"refused for another {left:.0f} s.",
            code="request_quarantined",
            retry_after=left,
        )

    def record_crash(self, content: bytes, number: int) -> None:
        """Record that a request was in flight at a crash.

        Args:
            content: the digest of the request.
            number: id of the crash.
        """
        self._expire()
        record = self._records.setdefault(content, _Record())
        self._records.move_to_end(content)
        record.until = time.monotonic() + self._seconds
        if number not in record.crashes:
            contents = record.crashes[number] = self._crashes.setdefault(number, set())
            contents.add(content)
            if len(record.crashes) == 2:
                self._metrics.quarantined.inc()
                logger.error("request quarantined: two engines failed while they processed it")
        if len(self._records) > MAX_ENTRIES:
            self._records.popitem(last=False)

    def answered(self, content: bytes) -> None:
        """Record a success, which clears the content."""
        self._answered[content] = None
        self._answered.move_to_end(content)
        if len(self._answered) > MAX_ENTRIES:
            self._answered.popitem(last=False)
        self._records.pop(content, None)

    def _suspects(self) -> int:
        return sum(len(record.crashes) > 1 for record in self._records.values())

    def _expire(self) -> None:
        now = time.monotonic()
        while self._records:
            if next(iter(self._records.values())).until > now:
                return
            self._records.popitem(last=False)


def trial_limit_reached() -> ApiError:
    """503 for a request on trial that cannot be admitted now."""
    return ApiError(
        503,
        "Two engines failed while they processed this request and others; such requests are "
        "admitted a few at a time, while enough engines work.",
        code="overloaded",
        retry_after=2,
    )
