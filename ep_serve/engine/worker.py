"""The worker's part that is not the model: reports for the API process, the CPU runner's hook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.worker.cpu_worker import CPUWorker

if TYPE_CHECKING:
    from ep_serve.engine.statistics import WorkerStatistics


class ReductionReports:
    """Added to every worker class through vLLM's `worker_extension_cls`."""

    model_runner: Any

    def reduction_report(self, keys: list[str]) -> dict[str, Any]:
        """What was kept of the items with these keys (hex), and the totals so far.

        Called with `collective_rpc`; the result crosses processes, so it holds plain values.
        """
        statistics: WorkerStatistics = self.model_runner.get_model().statistics
        return {
            "kept": {key: statistics.kept(bytes.fromhex(key)) for key in keys},
            "totals": statistics.snapshot().as_dict(),
        }

    def selection_report(self, key: str) -> dict[str, Any] | None:
        """Which tokens of the item with this key (hex) survived; see `PoolRecord.as_lists`."""
        statistics: WorkerStatistics = self.model_runner.get_model().statistics
        record = statistics.selection(bytes.fromhex(key))
        return None if record is None else record.as_lists()


class ReducingCPUWorker(CPUWorker):
    """vLLM's CPU worker, whose V1 runner is told that the model prunes.

    The GPU runner finds out by itself when it loads the model; the CPU runner has a `load_model` of
    its own, which forgets to (vLLM 0.32, `v1/worker/cpu_model_runner.py`).
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.model_runner.is_multimodal_pruning_enabled = True
