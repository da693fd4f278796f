"""Counters and timers of a worker."""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, cast

import torch

from ep_serve.engine.outcomes import WORKER_STAGES, plus
from ep_serve.layout import Kind
from ep_serve.sieve.checks import FAULTS, SieveError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ep_serve.engine.input.fused_item import FusedItem
    from ep_serve.engine.outcomes import Outcome, Work, WorkerStage
    from ep_serve.sieve.checks import CheckedSelection

MODALITIES = {Kind.VIDEO: "video", Kind.AUDIO: "audio", Kind.IMAGE: "image"}


@dataclass
class Totals:
    """Totals since the worker started; see `Work`."""

    full: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES.values(), 0))
    kept: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES.values(), 0))
    tower_hits: int = 0
    tower_misses: int = 0
    tower_cache_bytes: int = 0
    stage_seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(WORKER_STAGES, 0.0)
    )

    def as_work(self) -> Work:
        return cast("Work", asdict(self))


@dataclass(frozen=True)
class PendingOutcome:
    """The outcome of an item; its tensors are on the host, or being copied there."""

    key: str
    sieve: str
    error: SieveError | None
    numbers: torch.Tensor
    """Survivors of each modality, then 1 for each of `FAULTS` that the choice has: int64."""
    indices: torch.Tensor | None
    scores: torch.Tensor | None
    ready: torch.cuda.Event | None

    def result(self) -> Outcome:
        """Wait for the device, if it has not come that far, and read what it wrote."""
        if self.ready is not None:
            self.ready.synchronize()
        numbers = self.numbers.tolist()
        kept, faults = numbers[: len(MODALITIES)], numbers[len(MODALITIES) :]
        found = [
            SieveError(self.sieve, text)
            for text, fault in zip(FAULTS, faults, strict=True)
            if fault
        ]
        error = self.error or (found[0] if found else None)
        return {
            "kept": dict(zip(MODALITIES.values(), kept, strict=True)),
            "error": None if error is None else str(error),
            "indices": None if self.indices is None else self.indices.numpy().tobytes(),
            "scores": None if self.scores is None else self.scores.numpy().tobytes(),
        }


class WorkerStatistics:
    """Collects without waiting for the device.

    Args:
        collected: Whether outcomes of items are collected after each step (`take`).
    """

    def __init__(self, *, collected: bool = True) -> None:
        self.totals = Totals()
        self._reported = self.totals.as_work()
        self._reading = threading.Lock()
        self._collected = collected
        self._pending: list[PendingOutcome] = []
        self._events: deque[tuple[WorkerStage, torch.cuda.Event, torch.cuda.Event]] = deque()

    @contextmanager
    def stage(self, name: WorkerStage, device: torch.device) -> Iterator[None]:
        """Time a stage, on the device's own clock where it has one."""
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        began = time.perf_counter()
        yield
        self.totals.stage_seconds[name] += time.perf_counter() - began

    def record_item(
        self, item: FusedItem, sieve: str, kinds: torch.Tensor, checked: CheckedSelection
    ) -> None:
        """Note one item.

        Args:
            item: That was reduced.
            sieve: Who chose.
            kinds: (K,) int8 of the survivors, on the model's device.
            checked: The choice.

        Raises:
            RuntimeError: The choice is wrong, and nobody collects outcomes.
        """
        for kind, name in MODALITIES.items():
            self.totals.full[name] += int((item.kinds == kind).sum())
        counts = torch.stack([(kinds == kind).sum() for kind in MODALITIES])
        selection = checked.selection if item.return_selection else None
        pending = PendingOutcome(
            key=item.key.hex(),
            sieve=sieve,
            error=checked.error,
            numbers=_to_host(torch.cat([counts, checked.faults.long()])),
            indices=None if selection is None else _to_host(selection.indices.int()),
            scores=None
            if selection is None or selection.scores is None
            else _to_host(selection.scores),
            ready=_event(kinds.device),
        )
        if self._collected:
            self._pending.append(pending)
        elif (error := self.read([pending])[0][pending.key]["error"]) is not None:
            raise RuntimeError(error)

    def take(self) -> list[PendingOutcome]:
        """What happened since it was taken last."""
        pending, self._pending = self._pending, []
        return pending

    def read(self, pending: Sequence[PendingOutcome]) -> tuple[dict[str, Outcome], Work]:
        """The outcomes of items by their keys, and the counters since the last call.

        Waits for the device. Thread-safe: vLLM waits for an asynchronous step in another thread.
        """
        with self._reading:
            outcomes = {item.key: item.result() for item in pending}
            for outcome in outcomes.values():
                for name, count in outcome["kept"].items():
                    self.totals.kept[name] += count
            while self._events and self._events[0][2].query():
                stage, start, end = self._events.popleft()
                self.totals.stage_seconds[stage] += start.elapsed_time(end) / 1000
            before, self._reported = self._reported, self.totals.as_work()
            return outcomes, plus(self._reported, before, -1)


def _to_host(values: torch.Tensor) -> torch.Tensor:
    """A tensor's copy on the host; a CUDA device writes it when it comes that far (`_event`)."""
    return values.to("cpu", non_blocking=values.device.type == "cuda")


def _event(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event
