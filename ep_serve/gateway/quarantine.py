"""Requests that were in flight when engines broke, so that none ends one engine after the other.

An engine that breaks takes all its requests with it, and nothing tells which of them was the cause.
So requests are recorded by their content, whoever sends them, with the breaks they were part of:

- after two breaks, content that was part of both and nothing else was is refused for a while;
- content that shares both breaks with others is admitted on trial, a few requests at a time and
  without a second engine: an answer clears it, another break leaves it as the only suspect;
- content that has been answered before is refused only after a third break.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ep_serve.gateway.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ep_serve.gateway.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_ENTRIES = 4_096


@dataclass(slots=True)
class _Record:
    breaks: set[int] = field(default_factory=set)
    until: float = 0.0


class Quarantine:
    """What this process knows about contents and breaks; both are digests and numbers.

    Args:
        seconds: how long a record is kept after its last break.
        metrics: counts quarantined and refused requests.
    """

    def __init__(self, seconds: float, metrics: Metrics) -> None:
        self._seconds = seconds
        self._metrics = metrics
        self._records: OrderedDict[bytes, _Record] = OrderedDict()  # ordered by `until`
        self._in_flight: dict[int, set[bytes]] = {}
        self._answered: OrderedDict[bytes, None] = OrderedDict()
        self._trials = 0

    @contextmanager
    def admitted(self, content: bytes) -> Iterator[bool]:
        """Admit a request for the block; the value is whether it is on trial.

        Raises:
            ApiError: 422 if it is quarantined, 503 if too many are on trial.
        """
        trial = self.check(content)
        if trial and self._trials >= max(1, self._suspects() // 4):
            raise ApiError(
                503,
                "Two engines failed while they processed this request and others; such requests "
                "are admitted a few at a time.",
                code="overloaded",
                retry_after=2,
            )
        self._trials += trial
        try:
            yield trial
        finally:
            self._trials -= trial

    def check(self, content: bytes) -> bool:
        """Whether a request is a suspect.

        Raises:
            ApiError: 422 if it is quarantined.
        """
        self._expire()
        record = self._records.get(content)
        if record is None or len(record.breaks) < 2:
            return False
        shared = set.intersection(*(self._in_flight[number] for number in record.breaks))
        if len(shared) > 1 or (len(record.breaks) == 2 and content in self._answered):
            return True
        self._metrics.refused.labels("quarantine").inc()
        logger.warning("a quarantined request was refused")
        left = max(1.0, record.until - time.monotonic())
        raise ApiError(
            422,
            f"{len(record.breaks)} engines failed while they processed this request; it is refused "
            f"for another {left:.0f} s.",
            code="request_quarantined",
            retry_after=left,
        )

    def broke(self, content: bytes, number: int) -> None:
        """Record that a request was in flight when an engine broke.

        Args:
            content: the digest of the request.
            number: the break, the same for all requests that it ended.
        """
        self._expire()
        record = self._records.setdefault(content, _Record())
        self._records.move_to_end(content)
        record.until = time.monotonic() + self._seconds
        if number not in record.breaks:
            record.breaks.add(number)
            self._in_flight.setdefault(number, set()).add(content)
            if len(record.breaks) == 2:
                self._metrics.quarantined.inc()
                logger.error("request quarantined: two engines failed while they processed it")
        if len(self._records) > MAX_ENTRIES:
            self._forget(next(iter(self._records)))

    def answered(self, content: bytes) -> None:
        """Clear a request that an engine answered."""
        self._answered[content] = None
        self._answered.move_to_end(content)
        if len(self._answered) > MAX_ENTRIES:
            self._answered.popitem(last=False)
        if content in self._records:
            self._forget(content)

    def _suspects(self) -> int:
        return sum(len(record.breaks) > 1 for record in self._records.values())

    def _expire(self) -> None:
        now = time.monotonic()
        while self._records:
            content, record = next(iter(self._records.items()))
            if record.until > now:
                return
            self._forget(content)

    def _forget(self, content: bytes) -> None:
        for number in self._records.pop(content).breaks:
            contents = self._in_flight[number]
            contents.discard(content)
            if not contents:
                del self._in_flight[number]
