"""The worker on a GPU."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from ep_serve.engine.worker.base_worker import OutcomeWorkerMixin


class ReducingGPUWorker(OutcomeWorkerMixin, Worker):
    """vLLM's GPU worker, with the outcomes of items in its outputs."""
