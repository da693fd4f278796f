"""Ends requests whose grammar has no continuation or costs too much, with an error.

vLLM 0.32 computes in each step which tokens each grammar allows next. Where none may, every token
is forbidden, the sampled one is rejected and the request ends as an internal error; where the
answer takes seconds, all requests of the engine wait. The bounds of
`contract/structured_outputs.py` keep out what is known to do either; this is for what they miss.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import FinishReason
from vllm.v1.request import RequestStatus
from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

MAX_SECONDS = 0.5
"""Processor time that a grammar may take for one token."""


class WatchedGrammar(StructuredOutputGrammar):
    """A grammar of a backend, with a reason once it cannot be used any more."""

    def __init__(self, grammar: StructuredOutputGrammar) -> None:
        self._grammar = grammar
        self._tokens = 0
        self.failure: str | None = None

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        if self.failure is None:
            began = time.thread_time()
            accepted = self._grammar.accept_tokens(request_id, tokens)
            self._tokens += len(tokens)
            self._took(time.thread_time() - began)
            if not accepted:
                self.failure = f"rejects what follows {self._tokens} tokens of the answer"
        return self.failure is None

    def fill_bitmask(self, bitmask: torch.Tensor, batch_index: int) -> None:
        began = time.thread_time()
        self._grammar.fill_bitmask(bitmask, batch_index)
        self._took(time.thread_time() - began)
        if not bitmask[batch_index].any():
            self.failure = f"allows nothing after {self._tokens} tokens of the answer"
            bitmask[batch_index].fill_(-1)  # a forbidden vocabulary has no probabilities

    def _took(self, seconds: float) -> None:
        if seconds > MAX_SECONDS:
            self.failure = (
                f"takes {seconds:.2f} s for one token after {self._tokens} tokens of the answer; "
                f"the limit is {MAX_SECONDS:g} s"
            )

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        return self._grammar.validate_tokens(tokens)

    def rollback(self, num_tokens: int) -> None:
        self._grammar.rollback(num_tokens)

    def is_terminated(self) -> bool:
        return self._grammar.is_terminated()

    def reset(self) -> None:
        self._grammar.reset()


class GrammarGuardMixin(Scheduler):
    """Comes before vLLM's scheduler: watches grammars, and passes on why a request failed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._grammar_failures: dict[str, str] = {}
        """By request, until the next outputs."""

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        structured = request.structured_output_request
        if structured is not None:
            grammar = structured.grammar
            if isinstance(grammar, Exception):
                self._grammar_failures[request.request_id] = f"cannot be compiled: {grammar}"
            elif grammar is not None and not isinstance(grammar, WatchedGrammar):
                structured.grammar = WatchedGrammar(grammar)
        return super()._handle_blocked_waiting_request(request)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's; a request that failed by its grammar says why as its `stop_reason`."""
        watched = {
            request_id: grammar
            for request_id in scheduler_output.num_scheduled_tokens
            if isinstance(grammar := self._grammar_of(request_id), WatchedGrammar)
        }
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        failures = {key: grammar.failure for key, grammar in watched.items() if grammar.failure}
        failures |= self._grammar_failures
        self._grammar_failures = {}
        for output in (output for o in outputs.values() for output in o.outputs if failures):
            if output.finish_reason == FinishReason.ERROR and output.request_id in failures:
                output.stop_reason = failures[output.request_id]
        return outputs

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> Any:
        """vLLM's, but a compilation whose requests are gone is not started."""
        finished = super().finish_requests(request_ids, finished_status)
        for request in finished:
            structured = request.structured_output_request
            if structured is not None and isinstance(structured._grammar, Future):
                structured._grammar.cancel()
        return finished

    def _grammar_of(self, request_id: str) -> Any:
        request = self.requests.get(request_id)
        structured = request.structured_output_request if request else None
        return structured.grammar if structured else None
