"""Names of classes that vLLM is told; free of imports, so that every process may read them."""

from __future__ import annotations

SCHEDULER = "ep_serve.engine.worker.scheduler.reducing_scheduler"
CPU_WORKER = "ep_serve.engine.worker.cpu_worker.ReducingCPUWorker"
GPU_WORKER = "ep_serve.engine.worker.gpu_worker.ReducingGPUWorker"
