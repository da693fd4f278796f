"""vLLM's schedulers, with what our items need of them.

`--scheduler-cls` is vLLM's own option; with another value it is left alone, and neither of these
holds.

**How many prompts one step may reduce**: as many as the step has tokens for, before the reduction.
vLLM bounds the encoder's work in a step by `max_num_batched_tokens`, counted in the tokens that an
item leaves. Those of a fused item are few and its work goes by the full prompt: at a keep ratio of
0.05 one step would take towers and refiner through twenty clips, while running streams wait and all
twenty get their first token only when the last is done. Here each counts in full. With
`--mm-processor-cache-type shm` only workers see what is in an item, and vLLM's own count holds.

**What becomes of an item** is passed on from the worker's output to every request with that item,
see `outcomes.py`. Where the sieve failed, those requests fail, and what was computed from the
choice that took its place leaves the caches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cachetools import LRUCache
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import RequestStatus

from ep_serve.engine.input.fused_item import full_length
from ep_serve.engine.outcomes import (
    OUTCOME_FIELD,
    WORK_FIELD,
    ItemOutcome,
    Outcome,
    ReportingOutput,
    Work,
    plus,
)
from ep_serve.engine.worker.grammar_guard import GrammarGuardMixin

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

REMEMBERED_BYTES = 32 << 20
"""Outcomes that are kept for requests that are served from a cache."""

OUTCOME_BYTES = 256
"""What one takes beside its selection."""

_STARTED = (RequestStatus.RUNNING, RequestStatus.PREEMPTED)

logger = init_logger(__name__)


class _EncoderBudgetMixin(Scheduler):
    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        """vLLM's, with what it takes off the budget raised to the full prompts.

        The first item of a step always fits, however long it was, or it would never be served.
        """
        chosen, tokens, budget, loaded, duplicates = super()._try_schedule_encoder_inputs(
            request,
            num_computed_tokens,
            num_new_tokens,
            encoder_compute_budget,
            shift_computed_tokens,
        )
        dropped = sum(_dropped(request, i) for i in chosen)
        return chosen, tokens, max(0, budget - dropped), loaded, duplicates


class _OutcomeMixin(Scheduler):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outcomes: LRUCache[str, Outcome] = LRUCache(REMEMBERED_BYTES, getsizeof=_size)
        self._unreported: dict[str, str] = {}
        """Requests that had no output yet, and the keys of their items."""
        self._work: Work | None = None
        """The worker's counters that no output has carried yet."""
        self._forgotten: list[str] = []
        """Items whose embeddings the worker drops at the next step."""

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        for feature in request.mm_features:
            self._unreported[request.request_id] = feature.mm_hash

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._unreported.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's; the embeddings of failed items go first, also of those that come anew now."""
        output = super().schedule(*args, **kwargs)
        if self._forgotten:
            output.free_encoder_mm_hashes = [*output.free_encoder_mm_hashes, *self._forgotten]
            self._forgotten = []
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's, with outcomes in the outputs, and errors for requests whose sieve failed."""
        unreported = self._unreported.copy()
        failed = []
        if isinstance(model_runner_output, ReportingOutput):
            failed = self._store_outcomes(model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in failed:
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(_error_of(request))
        if unreported:
            self._attach(unreported, (output for o in outputs.values() for output in o.outputs))
        return outputs

    def _store_outcomes(self, output: ReportingOutput) -> list[Request]:
        """Store outcomes of items; return the requests that end because their sieve failed."""
        if output.work is not None:
            self._work = output.work if self._work is None else plus(self._work, output.work)
        for key, outcome in output.outcomes.items():
            if _size(outcome) <= REMEMBERED_BYTES:
                self._outcomes[key] = outcome
        broken = {key for key, outcome in output.outcomes.items() if outcome["error"] is not None}
        return self._fail(broken) if broken else []

    def _fail(self, broken: set[str]) -> list[Request]:
        """End the requests that got embeddings of these items, and forget those.

        One that has not started yet will have its item reduced anew.
        """
        failed: list[Request] = self.finish_requests(
            [
                request.request_id
                for request in self.requests.values()
                if request.status in _STARTED
                and any(feature.mm_hash in broken for feature in request.mm_features)
            ],
            RequestStatus.FINISHED_ERROR,
        )
        logger.error("%d requests failed because of their sieve", len(failed))
        for request in failed:
            self._forget_prefix(request)
            for feature in request.mm_features:
                self._forget_embeddings(feature.identifier)
        return failed

    def _forget_prefix(self, request: Request) -> None:
        """Take all KV blocks of a prompt and its answer out of the prefix cache."""
        pool = self.kv_cache_manager.block_pool
        groups = range(len(self.kv_cache_config.kv_cache_groups))
        for block_hash in request.block_hashes:
            for group in groups:
                while blocks := pool.get_cached_block(block_hash, [group]):
                    pool.evict_blocks({block.block_id for block in blocks})

    def _forget_embeddings(self, identifier: str) -> None:
        """Take an item out of the encoder cache, as `EncoderCacheManager.can_allocate` does."""
        manager = self.encoder_cache_manager
        size = manager.freeable.pop(identifier, None)
        if size is not None:  # else it was forgotten already, by another request with the item
            del manager.cached[identifier]
            del manager.num_embeds_by_hash[identifier]
            manager.num_free_slots += size
            self._forgotten.append(identifier)

    def _attach(self, unreported: Mapping[str, str], outputs: Iterable[EngineCoreOutput]) -> None:
        for output in outputs:
            key = unreported.get(output.request_id)
            if key is None:
                continue
            self._unreported.pop(output.request_id, None)
            told: dict[str, Any] = {}
            if (outcome := self._outcomes.get(key)) is not None:
                told[OUTCOME_FIELD] = ItemOutcome(key=key, **outcome)
            if self._work is not None:
                told[WORK_FIELD], self._work = self._work, None
            if told:
                output.ec_transfer_params = {**(output.ec_transfer_params or {}), **told}


class ReducingScheduler(GrammarGuardMixin, _OutcomeMixin, _EncoderBudgetMixin):
    """vLLM's `Scheduler` with these mixins."""


class ReducingAsyncScheduler(GrammarGuardMixin, _OutcomeMixin, _EncoderBudgetMixin, AsyncScheduler):
    """The same on top of vLLM's `AsyncScheduler`."""


def reducing_scheduler(vllm_config: VllmConfig, **more: Any) -> Scheduler:
    """The scheduler class for `async_scheduling`, which is known only after the config hook."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    kind = ReducingAsyncScheduler if asynchronous else ReducingScheduler
    return kind(vllm_config=vllm_config, **more)


def _dropped(request: Request, index: int) -> int:
    """Tokens of an item that its placeholder does not count."""
    feature = request.mm_features[index]
    full = full_length(feature.data)
    return 0 if full is None else full - feature.mm_position.get_num_embeds()


def _size(outcome: Outcome) -> int:
    """Bytes that an outcome takes."""
    return OUTCOME_BYTES + len(outcome["indices"] or b"") + len(outcome["scores"] or b"")


def _error_of(request: Request) -> EngineCoreOutput:
    """VLLM's output for a request that ends in an error."""
    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )
