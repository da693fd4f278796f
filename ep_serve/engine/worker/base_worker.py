"""Base of the worker classes: adds the outcomes of items to the outputs of steps.

Workers on every device import this module, see `cpu_worker.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from ep_serve.engine.outcomes import ReportingOutput

if TYPE_CHECKING:
    from ep_serve.engine.model.statistics import PendingOutcome, WorkerStatistics


class OutcomeWorkerMixin:
    """Comes before vLLM's worker class: adds the outcomes of items to the output of their step.

    Either method may return the output of a step (vLLM 0.32, `v1/worker/worker_base.py`), or what
    becomes one when the device is that far.
    """

    model_runner: Any

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_outcomes(super().execute_model(*args, **kwargs))  # type: ignore[misc]

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_outcomes(super().sample_tokens(*args, **kwargs))  # type: ignore[misc]

    def _with_outcomes(self, output: Any) -> Any:
        if not isinstance(output, ModelRunnerOutput | AsyncModelRunnerOutput):
            return output
        statistics: WorkerStatistics = self.model_runner.get_model().statistics
        pending = statistics.take()
        if not pending:
            return output
        if isinstance(output, AsyncModelRunnerOutput):
            return _AsyncReportingOutput(output, statistics, pending)
        return ReportingOutput.of(output, *statistics.read(pending))


class _AsyncReportingOutput(AsyncModelRunnerOutput):
    """vLLM waits for the device here, in a thread of its own, so the outcomes have come as well."""

    def __init__(
        self,
        output: AsyncModelRunnerOutput,
        statistics: WorkerStatistics,
        pending: list[PendingOutcome],
    ) -> None:
        self._output = output
        self._statistics = statistics
        self._pending = pending

    def get_output(self) -> ModelRunnerOutput:
        output = self._output.get_output()
        return ReportingOutput.of(output, *self._statistics.read(self._pending))
