from __future__ import annotations

import pytest
import torch

from ep_serve.engine import statistics
from ep_serve.engine.statistics import WorkerStatistics
from ep_serve.layout import Kind

FULL = {Kind.VIDEO: 6, Kind.AUDIO: 4, Kind.IMAGE: 0}
KEPT = torch.tensor([Kind.VIDEO, Kind.VIDEO, Kind.AUDIO], dtype=torch.int8)
CPU = torch.device("cpu")


def test_items_are_added_up_by_modality() -> None:
    counted = WorkerStatistics()
    for name in (1, 2):
        counted.record_item(bytes([name]), FULL, KEPT)
    totals = counted.snapshot()
    assert totals.items == 2
    assert totals.full == {"video": 12, "audio": 8, "image": 0}
    assert totals.kept == {"video": 4, "audio": 2, "image": 0}
    assert counted.snapshot().kept == totals.kept  # read twice, counted once


def test_the_report_of_an_item_can_be_read_again() -> None:
    counted = WorkerStatistics()
    counted.record_item(b"a", FULL, KEPT)
    for _ in range(2):
        assert counted.kept(b"a") == {"video": 2, "audio": 1, "image": 0}
    assert counted.kept(b"b") is None


def test_old_reports_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "REMEMBERED_REQUESTS", 2)
    counted = WorkerStatistics()
    for name in (b"a", b"b", b"c"):
        counted.record_item(name, FULL, KEPT)
    assert counted.kept(b"a") is None
    assert counted.kept(b"c") is not None


def test_stages_are_timed() -> None:
    counted = WorkerStatistics()
    for _ in range(2):
        with counted.stage("refiner", CPU):
            pass
    seconds = counted.snapshot().stage_seconds
    assert seconds["refiner"] > 0
    assert seconds["towers"] == 0
