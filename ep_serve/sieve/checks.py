"""Checks of plans and selections: other packages may register any sieve.

A choice is never trusted with the decoder: one that breaks the rules of `Selection` is replaced by
evenly spaced tokens, and the request that it was made for fails. What depends on values is checked
on the device, so nothing waits for it there.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from ep_serve.layout import Layout
from ep_serve.sieve.base import Budget, Plan, Pool, Selection, Sieve

FAULTS = (
    "chose tokens outside of the pool, out of order or twice",
    "returned states that are not finite",
    "returned scores that are not finite",
)
"""Faults found on the device, in the order of `CheckedSelection.faults`."""

logger = logging.getLogger(__name__)


class SieveError(Exception):
    """A sieve does not do what `Sieve` demands; says which one, and what."""

    def __init__(self, name: str, fault: str) -> None:
        super().__init__(f"The sieve {name!r} {fault}.")


@dataclass(frozen=True, slots=True)
class CheckedSelection:
    """A choice that can be used, whatever the sieve returned.

    Attributes:
        selection: That of the sieve, or evenly spaced tokens in its place.
        faults: (len(FAULTS),) bool on the pool's device: what is wrong with the sieve's choice.
        error: What is wrong with it that could be told at once.
    """

    selection: Selection
    faults: Tensor
    error: SieveError | None = None


def make_plan(sieve: type[Sieve], layout: Layout, budget: Budget) -> Plan:
    """Budget a sieve for its plan.

    Raises:
        ValueError: The sieve cannot do what is asked for, or would keep nothing of the media.
        SieveError: It has no plan that could be carried out.
    """
    try:
        plan = sieve.plan(layout, budget)
        keep = index(plan.keep)
    except ValueError:
        raise
    except Exception as error:
        logger.exception("the sieve %r made no plan", sieve.name)
        raise SieveError(sieve.name, f"made no plan: {type(error).__name__}") from error
    if not 0 <= keep <= layout.num_av:
        raise SieveError(sieve.name, f"plans to keep {keep} of {layout.num_av} tokens")
    if layout.num_av and not keep:
        raise ValueError(f"the sieve {sieve.name!r} would keep none of {layout.num_av} tokens")
    return plan


def select(sieve: Sieve, pool: Pool, layout: Layout, budget: Budget, keep: int) -> CheckedSelection:
    """Let a sieve choose `keep` tokens of a pool, and check what it chose; never raises.

    Args:
        sieve: Any.
        pool: The AV tokens of `layout`.
        layout: What `budget` was planned for, in another process.
        budget: How much was asked for.
        keep: What the plan made of it.
    """
    try:
        plan = make_plan(type(sieve), layout, budget)
        if plan.keep != keep:
            raise SieveError(sieve.name, f"plans to keep {plan.keep} tokens after {keep}")
        selection = sieve.select(pool, plan)
        _check_form(sieve.name, selection, pool, keep)
    except Exception as error:
        logger.exception("the sieve %r failed", sieve.name)
        if not isinstance(error, SieveError):
            error = SieveError(sieve.name, f"failed: {type(error).__name__}")
        faults = torch.zeros(len(FAULTS), dtype=torch.bool, device=pool.hidden.device)
        return CheckedSelection(Selection(_spread(pool, keep)), faults, error)
    return _check_values(selection, pool, keep)


def _check_form(name: str, selection: object, pool: Pool, keep: int) -> None:
    """Raise SieveError for faults that are visible without the device."""
    if not isinstance(selection, Selection):
        raise SieveError(name, f"returned a {type(selection).__name__} instead of a Selection")
    states = pool.hidden
    _check_tensor(name, "indices", selection.indices, (keep,), torch.int64, states)
    if selection.hidden is not None:
        shape = (keep, states.shape[1])
        _check_tensor(name, "states", selection.hidden, shape, states.dtype, states)
    if selection.scores is not None:
        _check_tensor(name, "scores", selection.scores, (pool.size,), torch.float32, states)


def _check_tensor(
    name: str, what: str, found: object, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> None:
    if not isinstance(found, Tensor):
        raise SieveError(name, f"returned {what} that are no tensor: {type(found).__name__}")
    for aspect, expected, given in (
        ("shape", shape, tuple(found.shape)),
        ("dtype", dtype, found.dtype),
        ("device", like.device, found.device),
    ):
        if expected != given:
            raise SieveError(name, f"returned {what} of {aspect} {given}, not {expected}")


def _check_values(selection: Selection, pool: Pool, keep: int) -> CheckedSelection:
    """Replace a choice that is wrong, without waiting for the device to know."""
    indices, hidden, scores = selection.indices, selection.hidden, selection.scores
    inside = (indices >= 0) & (indices < pool.size)
    right = inside.all() & (indices.diff() > 0).all()
    finite = [
        torch.ones_like(right) if values is None else values.isfinite().all()
        for values in (hidden, scores)
    ]
    usable = torch.stack([right, *finite])
    indices = torch.where(right, indices, _spread(pool, keep))
    if hidden is not None:
        hidden = torch.where(usable.all(), hidden, pool.hidden[indices])
    return CheckedSelection(Selection(indices, hidden, scores), ~usable)


def _spread(pool: Pool, keep: int) -> Tensor:
    """`ep_serve.layout.spread`, computed where the pool is."""
    odd = 2 * torch.arange(keep, device=pool.hidden.device) + 1
    return odd * pool.size // max(2 * keep, 1)
