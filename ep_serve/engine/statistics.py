"""What the worker counts and measures; the API process reads it with one call (`worker.py`)."""

from __future__ import annotations

import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from ep_serve.layout import Kind

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ep_serve.engine.selection_report import PoolRecord

Stage = Literal["towers", "refiner", "selection"]
STAGES: tuple[Stage, ...] = ("towers", "refiner", "selection")
MODALITIES = {Kind.VIDEO: "video", Kind.AUDIO: "audio", Kind.IMAGE: "image"}

REMEMBERED_REQUESTS = 65_536
"""Items whose counts are kept, so that a request served from a cache still has its report."""

REMEMBERED_SELECTIONS = 64
"""Items whose survivors are kept for those who asked for them."""

UNREAD_ITEMS = 4096
"""Items whose counts may wait on the device before they are added up."""


@dataclass
class Snapshot:
    """Totals since the worker started."""

    items: int = 0
    """Fused items that went through the sieve."""
    full: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES.values(), 0))
    kept: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MODALITIES.values(), 0))
    tower_hits: int = 0
    tower_misses: int = 0
    tower_cache_bytes: int = 0
    stage_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


class WorkerStatistics:
    """Collects without waiting for the device: its values are read when they are asked for."""

    def __init__(self) -> None:
        self.totals = Snapshot()
        self._kept: OrderedDict[bytes, torch.Tensor | list[int]] = OrderedDict()
        self._selections: OrderedDict[bytes, PoolRecord] = OrderedDict()
        self._unread: list[tuple[torch.Tensor, dict[str, int]]] = []
        self._events: list[tuple[Stage, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: Stage, device: torch.device) -> Iterator[None]:
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

    def record_item(self, key: bytes, full: dict[Kind, int], kept_kinds: torch.Tensor) -> None:
        """Note one item: its full counts, and the kinds (k,) int8 of its survivors."""
        self.totals.items += 1
        for kind, name in MODALITIES.items():
            self.totals.full[name] += full[kind]
        counts = torch.stack([(kept_kinds == kind).sum() for kind in MODALITIES])
        self._kept[key] = counts
        self._kept.move_to_end(key)
        self._unread.append((counts, self.totals.kept))
        while len(self._kept) > REMEMBERED_REQUESTS:
            self._kept.popitem(last=False)
        if len(self._unread) > UNREAD_ITEMS:  # nobody asks, as in scripts without a server
            self.snapshot()

    def record_selection(self, key: bytes, record: PoolRecord) -> None:
        """Remember which tokens of an item survived."""
        self._selections[key] = record
        self._selections.move_to_end(key)
        while len(self._selections) > REMEMBERED_SELECTIONS:
            self._selections.popitem(last=False)

    def selection(self, key: bytes) -> PoolRecord | None:
        """The survivors of an item; None if nobody asked for them, or it is too long ago."""
        return self._selections.get(key)

    def kept(self, key: bytes) -> dict[str, int] | None:
        """Survivors of an item by modality; None if it is too long ago."""
        counts = self._kept.get(key)
        if counts is None:
            return None
        if isinstance(counts, torch.Tensor):
            counts = self._kept[key] = counts.tolist()
        return dict(zip(MODALITIES.values(), counts, strict=True))

    def snapshot(self) -> Snapshot:
        """The totals, with what the device has finished by now."""
        for counts, totals in self._unread:
            for name, count in zip(MODALITIES.values(), counts.tolist(), strict=True):
                totals[name] += count
        self._unread.clear()
        pending = []
        for name, start, end in self._events:
            if end.query():
                self.totals.stage_seconds[name] += start.elapsed_time(end) / 1000
            else:
                pending.append((name, start, end))
        self._events = pending
        return self.totals
