"""Reports reductions in responses, and the worker's counters on `/metrics`.

Both come with the first output of a request (`outcomes.py`), so a response waits for nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import numpy as np

from ep_serve.engine.input.selection_report import describe
from ep_serve.engine.metrics import metrics
from ep_serve.engine.outcomes import OUTCOME_FIELD, WORK_FIELD

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.engine import EngineCoreOutput

    from ep_serve.engine.input.processor import Reduction
    from ep_serve.engine.input.selection_report import PoolShape
    from ep_serve.engine.outcomes import ItemOutcome, Work


class _Expected:
    """The outcome of an item, once it has come."""

    outcome: ItemOutcome | None = None


_expected: WeakValueDictionary[str, _Expected] = WeakValueDictionary()
"""By the keys of the items of running requests; only the event loop's thread looks at it."""


class RequestReport:
    """The report of one request; it receives the outcomes that arrive while it exists."""

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction
        key = reduction.key.hex()
        self._expected = _expected.get(key) or _Expected()
        _expected[key] = self._expected

    @property
    def error(self) -> str | None:
        """Why the request fails."""
        outcome = self._expected.outcome
        return None if outcome is None else outcome["error"]

    def usage(self) -> dict[str, Any]:
        """The `usage.reduction` object."""
        reduction, outcome = self._reduction, self._expected.outcome
        usage = {
            "keep_ratio": reduction.keep_ratio,
            "prompt_tokens_full": reduction.full_length,
            "prompt_tokens_reduced": reduction.reduced_length,
            "av_tokens_full": sum(reduction.full.values()),
            "av_tokens_kept": reduction.kept,
            **reduction.rates,
            **{
                modality: {"full": full, "kept": outcome and outcome["kept"][modality]}
                for modality, full in reduction.full.items()
            },
        }
        if reduction.pool is not None:
            usage["selection"] = outcome and _selection(reduction.pool, outcome)
        return usage


def _selection(pool: PoolShape, outcome: ItemOutcome) -> list[dict[str, Any]] | None:
    indices, scores = outcome["indices"], outcome["scores"]
    if indices is None:
        return None
    return describe(
        pool,
        np.frombuffer(indices, dtype=np.int32),
        None if scores is None else np.frombuffer(scores, dtype=np.float32),
    )


def receive(outputs: Sequence[EngineCoreOutput]) -> None:
    """Take outcomes and counters out of an output of the engine."""
    for output in outputs:
        params = output.ec_transfer_params
        if params is None:
            continue
        outcome: ItemOutcome | None = params.pop(OUTCOME_FIELD, None)
        work: Work | None = params.pop(WORK_FIELD, None)
        output.ec_transfer_params = params or None
        if outcome is not None and (expected := _expected.get(outcome["key"])) is not None:
            expected.outcome = outcome
        if work is not None:
            metrics().worker(work)
