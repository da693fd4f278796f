"""How many prompts one step may reduce: as many as the step has tokens for, before the reduction.

vLLM bounds the encoder's work in a step by `max_num_batched_tokens`, counted in the tokens that an
item leaves. Those of a fused item are few and its work goes by the full prompt: at a keep ratio of
0.05 one step would take towers and refiner through twenty clips, while running streams wait and all
twenty get their first token only when the last is done. Here each counts in full.

`--scheduler-cls` is vLLM's own option; with another value it is left alone. With
`--mm-processor-cache-type shm` only workers see what is in an item, and vLLM's own count holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from ep_serve.engine.item import full_length

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.request import Request


class _CountsFullPrompts(Scheduler):
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


class ReducingScheduler(_CountsFullPrompts):
    """Beside vLLM's `Scheduler`."""


class ReducingAsyncScheduler(_CountsFullPrompts, AsyncScheduler):
    """Beside vLLM's `AsyncScheduler`."""


def reducing_scheduler(vllm_config: VllmConfig, **more: Any) -> Scheduler:
    """The scheduler that goes with the server's setting; vLLM knows that only after our hook."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    kind = ReducingAsyncScheduler if asynchronous else ReducingScheduler
    return kind(vllm_config=vllm_config, **more)


def _dropped(request: Request, index: int) -> int:
    """Tokens of an item that its placeholder does not count."""
    feature = request.mm_features[index]
    full = full_length(feature.data)
    return 0 if full is None else full - feature.mm_position.get_num_embeds()
