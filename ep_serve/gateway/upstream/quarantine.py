"""Requests that were in flight when engines broke, so that none ends one engine after the other.

An engine that breaks takes all its requests with it, and nothing tells which of them was the cause,
or whether one was. So requests are recorded by their content, whoever sends them, with the breaks
that they were part of:

- content that was part of two breaks, and was all that they have in common, is refused for a while;
- content that shares both breaks with others is on trial: it is admitted a few at a time, while
  another engine stays, and not tried again on a second one. An answer clears it, a third break
  leaves it as the cause. That others are cleared says nothing: perhaps no request was the cause;
- content that has been answered before is refused only after a third break, too.
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
    breaks: dict[int, set[bytes]] = field(default_factory=dict)
    """What was in flight at each break, by its number."""
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
        self._breaks: WeakValueDictionary[int, set[bytes]] = WeakValueDictionary()
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
            raise not_now()
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
        shared = set.intersection(*record.breaks.values())
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
            contents = record.breaks[number] = self._breaks.setdefault(number, set())
            contents.add(content)
            if len(record.breaks) == 2:
                self._metrics.quarantined.inc()
                logger.error("request quarantined: two engines failed while they processed it")
        if len(self._records) > MAX_ENTRIES:
            self._records.popitem(last=False)

    def answered(self, content: bytes) -> None:
        """Clear a request that an engine answered."""
        self._answered[content] = None
        self._answered.move_to_end(content)
        if len(self._answered) > MAX_ENTRIES:
            self._answered.popitem(last=False)
        self._records.pop(content, None)

    def _suspects(self) -> int:
        return sum(len(record.breaks) > 1 for record in self._records.values())

    def _expire(self) -> None:
        now = time.monotonic()
        while self._records:
            if next(iter(self._records.values())).until > now:
                return
            self._records.popitem(last=False)


def not_now() -> ApiError:
    """The refusal of a request on trial."""
    return ApiError(
        503,
        "Two engines failed while they processed this request and others; such requests are "
        "admitted a few at a time, while enough engines work.",
        code="overloaded",
        retry_after=2,
    )
