"""The worker on a CPU. Nothing that a GPU's worker imports may import this module.

vLLM's module replaces `torch.cuda.Event`, `torch.cuda.Stream`, `Tensor.pin_memory`,
`torch.accelerator.synchronize` and more by stand-ins, for the whole process that imports it.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from ep_serve.engine.worker.base_worker import OutcomeWorkerMixin


class ReducingCPUWorker(OutcomeWorkerMixin, CPUWorker):
    """vLLM's CPU worker, with multimodal pruning enabled in its V1 runner; see `gpu_worker.py`.

    The GPU runner sets that when it loads the model; the CPU runner's own `load_model` does not
    (vLLM 0.32, `v1/worker/cpu_model_runner.py`).
    """

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self.model_runner.is_multimodal_pruning_enabled = True
