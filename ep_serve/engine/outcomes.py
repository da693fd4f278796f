"""Outcomes of fused items, and their way from the worker to the API process.

The worker adds it to the output of the step that reduced the item (`ReportingOutput`). The
scheduler stores it and adds it to the first output of every request with that item, also of those
that are served from a cache. It therefore arrives before the answer does, without a call to a busy
worker. The worker's counters for `/metrics` travel with the outputs of steps as well, each
increment once.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, cast

from vllm.v1.outputs import ModelRunnerOutput

from ep_serve.engine.class_names import CPU_WORKER, GPU_WORKER, SCHEDULER

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.config import VllmConfig

WorkerStage = Literal["towers", "refiner", "selection"]
WORKER_STAGES: tuple[WorkerStage, ...] = ("towers", "refiner", "selection")
"""Stages of a request in a worker, in order."""

OUTCOME_FIELD = "ep_serve_outcome"
WORK_FIELD = "ep_serve_work"
"""Entries of vLLM's `EngineCoreOutput.ec_transfer_params` that hold `ItemOutcome` and `Work`."""


class Outcome(TypedDict):
    """Plain values, because it crosses processes."""

    kept: dict[str, int]
    """Survivors by modality."""
    error: str | None
    """Why the requests with this item fail."""
    indices: bytes | None
    """(K,) int32 indices of the pool, with `return_selection`."""
    scores: bytes | None
    """(n,) float32, with `return_selection` and a sieve that ranks the whole pool."""


class ItemOutcome(Outcome):
    """An outcome and the key of its item."""

    key: str


class Work(TypedDict):
    """Counters of a worker, absolute or as a difference."""

    full: dict[str, int]
    """AV tokens that entered the sieve, by modality."""
    kept: dict[str, int]
    tower_hits: int
    tower_misses: int
    tower_cache_bytes: int
    """Size of the cache, or its growth."""
    stage_seconds: dict[str, float]


def plus(one: Work, other: Work, sign: int = 1) -> Work:
    """The sum, or with a sign of -1 the difference."""
    result: Any = {
        name: {key: number + sign * other[name][key] for key, number in value.items()}  # type: ignore[literal-required]
        if isinstance(value, dict)
        else value + sign * other[name]  # type: ignore[literal-required]
        for name, value in one.items()
    }
    return cast("Work", result)


@dataclass
class ReportingOutput(ModelRunnerOutput):
    """vLLM's output of a step that reduced items."""

    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    """Outcomes by the keys of their items."""
    work: Work | None = None
    """The worker's counters since its last report."""

    @classmethod
    def of(cls, output: ModelRunnerOutput, outcomes: Mapping[str, Outcome], work: Work) -> Self:
        # vLLM shares its empty output between steps, so it is never written to.
        given = {f.name: getattr(output, f.name) for f in fields(ModelRunnerOutput)}
        return cls(**given, outcomes=outcomes, work=work)


def collected(vllm_config: VllmConfig) -> bool:
    """Whether worker and scheduler are ours, so that outcomes reach the API process.

    Where they are not, or where caches are shared with other engines, from which a failed item
    could not be taken back, a sieve that fails ends the engine: a wrong answer would be worse.
    """
    return (
        vllm_config.parallel_config.worker_cls in (CPU_WORKER, GPU_WORKER)
        and vllm_config.scheduler_config.scheduler_cls == SCHEDULER
        and vllm_config.kv_transfer_config is None
        and vllm_config.ec_transfer_config is None
    )
