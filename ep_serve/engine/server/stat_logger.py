"""vLLM's plug-in point for statistics: makes this project's series on `/metrics`.

vLLM builds it together with `AsyncLLM`, in each process that serves, whatever else is patched there
or not: so this is also where the patches are checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from ep_serve.checkpoint.config import ARCHITECTURE, REDUCED_ARCHITECTURE
from ep_serve.engine.server import patching

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class ReductionStatLogger(AggregateStatLoggerBase):
    """Loaded for every model that vLLM serves; does nothing for those that are not ours."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        """Raise `ServeError` if the patches of vLLM's server are not in place."""
        ours = vllm_config.model_config.architecture in (ARCHITECTURE, REDUCED_ARCHITECTURE)
        if ours:
            patching.check()
            from ep_serve.engine.metrics import metrics

            metrics()  # the series exist, at zero, before the first request

    def record(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: counts arrive with the outputs of requests, see `reduction_reports.py`."""

    def log_engine_initialized(self) -> None:
        """Nothing to say at start-up."""
