"""Qualified names of the classes that vLLM loads; free of imports, for every process."""

from __future__ import annotations

SCHEDULER = "ep_serve.engine.worker.scheduler.reducing_scheduler"
CPU_WORKER = "ep_serve.engine.worker.cpu_worker.ReducingCPUWorker"
GPU_WORKER = "ep_serve.engine.worker.gpu_worker.ReducingGPUWorker"
