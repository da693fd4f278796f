from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ep_serve.engine.model.statistics import WorkerStatistics
from ep_serve.engine.outcomes import plus
from ep_serve.layout import Kind
from ep_serve.sieve import Selection
from ep_serve.sieve.checks import FAULTS, CheckedSelection, SieveError

V, A = Kind.VIDEO, Kind.AUDIO
KEPT = torch.tensor([V, V, A], dtype=torch.int8)
CHOICE = Selection(torch.tensor([0, 2, 7]), scores=torch.arange(10) / 4)
CPU = torch.device("cpu")


def item(number: int = 1, *, return_selection: bool = False) -> Any:
    """What the statistics look at of an item of six video and four audio tokens."""
    return SimpleNamespace(
        key=bytes([number]),
        kinds=torch.tensor([V] * 6 + [A] * 4, dtype=torch.int8),
        return_selection=return_selection,
    )


def checked(*faults: int, error: SieveError | None = None) -> CheckedSelection:
    wrong = torch.tensor([number in faults for number in range(len(FAULTS))])
    return CheckedSelection(CHOICE, wrong, error)


def test_items_are_added_up_by_modality() -> None:
    counted = WorkerStatistics()
    for number in (1, 2):
        counted.record_item(item(number), "guest", KEPT, checked())
    _, work = counted.read(counted.take())
    assert work["full"] == {"video": 12, "audio": 8, "image": 0}
    assert work["kept"] == {"video": 4, "audio": 2, "image": 0}
    assert counted.take() == []


def test_work_is_reported_once() -> None:
    counted = WorkerStatistics()
    told = []
    for held in (30, 20):
        counted.totals.tower_misses += 3
        counted.totals.tower_cache_bytes = held
        counted.record_item(item(), "guest", KEPT, checked())
        told.append(counted.read(counted.take())[1])
    assert [work["tower_misses"] for work in told] == [3, 3]
    assert [work["tower_cache_bytes"] for work in told] == [30, -10]
    assert [work["kept"]["video"] for work in told] == [2, 2]
    total = plus(told[0], told[1])
    assert (total["tower_misses"], total["tower_cache_bytes"]) == (6, 20)
    assert total["full"] == {"video": 12, "audio": 8, "image": 0}


def test_an_outcome_tells_what_was_kept() -> None:
    counted = WorkerStatistics()
    counted.record_item(item(), "guest", KEPT, checked())
    outcomes, _ = counted.read(counted.take())
    assert outcomes == {
        "01": {
            "kept": {"video": 2, "audio": 1, "image": 0},
            "error": None,
            "indices": None,
            "scores": None,
        }
    }


def test_an_outcome_holds_the_selection_where_it_is_asked_for() -> None:
    counted = WorkerStatistics()
    counted.record_item(item(return_selection=True), "guest", KEPT, checked())
    (outcome,) = counted.read(counted.take())[0].values()
    assert outcome["indices"] == torch.tensor([0, 2, 7], dtype=torch.int32).numpy().tobytes()
    assert outcome["scores"] == (torch.arange(10) / 4).numpy().tobytes()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (checked(0), "The sieve 'guest' chose tokens outside of the pool, out of order or twice."),
        (checked(2), "The sieve 'guest' returned scores that are not finite."),
        (checked(error=SieveError("guest", "failed: KeyError")), "The sieve 'guest' failed: Key"),
    ],
)
def test_an_outcome_tells_what_is_wrong_with_a_choice(
    found: CheckedSelection, message: str
) -> None:
    counted = WorkerStatistics()
    counted.record_item(item(), "guest", KEPT, found)
    counted.record_item(item(2), "guest", KEPT, checked())
    first, second = counted.read(counted.take())[0].values()
    assert (first["error"] or "").startswith(message)
    assert second["error"] is None


def test_a_wrong_selection_that_would_not_be_reported_is_raised() -> None:
    counted = WorkerStatistics(collected=False)
    with pytest.raises(RuntimeError, match="'guest' returned states that are not finite"):
        counted.record_item(item(), "guest", KEPT, checked(1))
    counted.record_item(item(), "guest", KEPT, checked())
    assert counted.take() == []


def test_stages_are_timed() -> None:
    counted = WorkerStatistics()
    for _ in range(2):
        with counted.stage("refiner", CPU):
            pass
    seconds = counted.read([])[1]["stage_seconds"]
    assert seconds["refiner"] > 0
    assert seconds["towers"] == 0
