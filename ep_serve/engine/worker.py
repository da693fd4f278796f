"""The worker's part that is not the model: reports for the API process.

Workers on every device import this module, see `cpu_worker.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
