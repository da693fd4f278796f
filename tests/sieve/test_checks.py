from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_serve.layout import Layout, spread
from ep_serve.sieve import Budget, Plan, Pool, Selection, Sieve, get_sieve, known_sieves
from ep_serve.sieve.checks import FAULTS, CheckedSelection, SieveError, make_plan, select
from tests.sieve.pools import HIDDEN_SIZE, LAYOUTS, make_layout, make_pool, pool_for

SIZE, KEEP = 12, 4
RIGHT = torch.tensor([1, 3, 5, 7])
STATES = torch.zeros(KEEP, HIDDEN_SIZE)
SCORES = torch.zeros(SIZE)
NAN, INF = float("nan"), float("inf")


class Guest(Sieve):
    """A sieve of another package, that returns what a test wants."""

    name = "guest"
    reads_text = False
    uses_refiner = False

    def __init__(self, returned: Any) -> None:
        self.returned = returned

    def select(self, pool: Pool, plan: Plan) -> Selection:
        if isinstance(self.returned, Exception):
            raise self.returned
        return self.returned  # type: ignore[no-any-return]


def choose(returned: Any) -> CheckedSelection:
    layout = make_layout(SIZE)
    return select(Guest(returned), make_pool(SIZE), layout, Budget(KEEP / SIZE), KEEP)


def values(what: float, size: int, place: int = 0) -> torch.Tensor:
    made = torch.zeros(size)
    made[place] = what
    return made


def test_a_right_choice_is_left_alone() -> None:
    found = choose(Selection(RIGHT, STATES, SCORES))
    assert found.error is None
    assert not found.faults.any()
    assert torch.equal(found.selection.indices, RIGHT)
    assert found.selection.hidden is not None
    assert torch.equal(found.selection.hidden, STATES)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (ZeroDivisionError("secret"), "'guest' failed: ZeroDivisionError."),
        (RIGHT, "returned a Tensor instead of a Selection"),
        (None, "returned a NoneType instead of a Selection"),
        (Selection(RIGHT[:3]), r"returned indices of shape \(3,\), not \(4,\)"),
        (Selection(torch.arange(5)), r"returned indices of shape \(5,\), not \(4,\)"),
        (Selection(RIGHT[:, None]), r"returned indices of shape \(4, 1\), not \(4,\)"),
        (Selection(RIGHT.int()), "returned indices of dtype torch.int32, not torch.int64"),
        (Selection(RIGHT.float()), "returned indices of dtype torch.float32, not torch.int64"),
        (Selection(RIGHT.to("meta")), "returned indices of device meta, not cpu"),
        (Selection(RIGHT.tolist()), "returned indices that are no tensor: list"),  # type: ignore[arg-type]
        (Selection(RIGHT, STATES[:3]), r"returned states of shape \(3, 16\), not \(4, 16\)"),
        (Selection(RIGHT, STATES.double()), "returned states of dtype torch.float64"),
        (Selection(RIGHT, None, SCORES[:3]), r"returned scores of shape \(3,\), not \(12,\)"),
        (Selection(RIGHT, None, SCORES.half()), "returned scores of dtype torch.float16"),
    ],
)
def test_faults_visible_without_the_device_are_errors_that_name_the_sieve(
    returned: Any, message: str
) -> None:
    found = choose(returned)
    with pytest.raises(SieveError, match=message):
        raise found.error or AssertionError
    assert "secret" not in str(found.error)
    check_usable(found)


@pytest.mark.parametrize(
    ("returned", "fault"),
    [
        (Selection(torch.tensor([-1, 3, 5, 7])), 0),
        (Selection(torch.tensor([1, 3, 5, SIZE])), 0),
        (Selection(torch.tensor([3, 1, 5, 7])), 0),
        (Selection(torch.tensor([1, 3, 3, 7])), 0),
        (Selection(RIGHT, values(NAN, KEEP)[:, None].expand(-1, HIDDEN_SIZE)), 1),
        (Selection(RIGHT, values(INF, KEEP)[:, None].expand(-1, HIDDEN_SIZE)), 1),
        (Selection(RIGHT, None, values(NAN, SIZE)), 2),
        (Selection(RIGHT, None, values(-INF, SIZE, 11)), 2),
    ],
)
def test_faults_of_values_are_found_on_the_device(returned: Selection, fault: int) -> None:
    found = choose(returned)
    assert found.error is None
    assert found.faults.tolist() == [number == fault for number in range(len(FAULTS))]
    check_usable(found)


def check_usable(found: CheckedSelection) -> None:
    indices = found.selection.indices
    assert indices.dtype == torch.int64
    assert indices.shape == (KEEP,)
    assert (indices.diff() > 0).all()
    assert ((indices >= 0) & (indices < SIZE)).all()
    if found.selection.hidden is not None:
        assert found.selection.hidden.isfinite().all()


def test_a_plan_that_changes_between_processes_is_an_error() -> None:
    found = select(Guest(Selection(RIGHT)), make_pool(SIZE), make_layout(SIZE), Budget(1.0), KEEP)
    assert str(found.error) == "The sieve 'guest' plans to keep 12 tokens after 4."
    check_usable(found)


@given(
    indices=st.lists(st.integers(-3, SIZE + 3), max_size=6),
    change=st.sampled_from([torch.Tensor.long, torch.Tensor.int, torch.Tensor.bool]),
)
@settings(deadline=None)
def test_whatever_indices_come_the_choice_can_be_used(
    indices: list[int], change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    found = choose(Selection(change(torch.tensor(indices, dtype=torch.int64))))
    check_usable(found)
    wanted = sorted({i for i in indices if 0 <= i < SIZE}) == indices and len(indices) == KEEP
    right = found.error is None and not found.faults.any()
    assert right == (wanted and change is torch.Tensor.long)


@pytest.mark.parametrize("name", known_sieves())
@given(layout=LAYOUTS, keep_ratio=st.floats(0.01, 1))
@settings(deadline=None, max_examples=20)
def test_sieves_of_this_package_pass(name: str, layout: Layout, keep_ratio: float) -> None:
    sieve = get_sieve(name).for_model(HIDDEN_SIZE)
    keep = make_plan(type(sieve), layout, Budget(keep_ratio)).keep
    with torch.no_grad():
        found = select(sieve, pool_for(layout), layout, Budget(keep_ratio), keep)
    assert found.error is None
    assert not found.faults.any()


@pytest.mark.parametrize("name", known_sieves())
def test_states_that_are_not_finite_end_no_sieve(name: str) -> None:
    layout = make_layout(SIZE)
    pool = replace(pool_for(layout), hidden=torch.full((SIZE, HIDDEN_SIZE), NAN))
    keep = make_plan(get_sieve(name), layout, Budget(0.5)).keep
    with torch.no_grad():
        found = select(get_sieve(name).for_model(HIDDEN_SIZE), pool, layout, Budget(0.5), keep)
    indices = found.selection.indices
    assert (indices.diff() > 0).all()
    assert len(indices) == keep
    if name == "cs2":
        assert found.faults[2]


def test_the_choice_in_a_sieves_place_is_evenly_spaced() -> None:
    assert choose(None).selection.indices.tolist() == spread(SIZE, KEEP).tolist()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (-1, "'guest' plans to keep -1 of 12 tokens"),
        (13, "'guest' plans to keep 13 of 12 tokens"),
        (2.5, "'guest' made no plan: TypeError"),
        (None, "'guest' made no plan: TypeError"),
        (ZeroDivisionError("secret"), "'guest' made no plan: ZeroDivisionError"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_an_error_that_names_the_sieve(
    keep: Any, message: str
) -> None:
    with pytest.raises(SieveError, match=message):
        make_plan(planning(keep), make_layout(SIZE), Budget(0.5))


def test_a_plan_that_keeps_nothing_of_the_media_is_refused() -> None:
    with pytest.raises(ValueError, match="'guest' would keep none of 12 tokens"):
        make_plan(planning(0), make_layout(SIZE), Budget(0.5))
    assert make_plan(planning(0), make_layout(0), Budget(0.5)).keep == 0


def test_a_plan_may_count_in_numpys_numbers() -> None:
    assert make_plan(planning(np.int64(3)), make_layout(SIZE), Budget(0.5)).keep == 3


def planning(keep: Any) -> type[Sieve]:
    """A sieve with this plan."""

    class Planning(Guest):
        @classmethod
        def plan(cls, layout: Layout, budget: Budget) -> Plan:
            if isinstance(keep, Exception):
                raise keep
            return Plan(keep)

    return Planning
