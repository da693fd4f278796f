"""What a worker on a GPU imports leaves torch as it is; no GPU is needed to see that."""

from __future__ import annotations

import subprocess
import sys

import pytest

WORKER = """
import importlib, pkgutil, sys

import torch
import vllm.v1.worker.gpu_worker  # what it changes itself is vLLM's affair

watched = {
    torch: ["Event"],
    torch.cuda: ["Event", "Stream", "stream", "set_stream", "current_stream"],
    torch.accelerator: ["synchronize", "empty_cache", "get_memory_info"],
    torch.Tensor: ["pin_memory", "record_stream"],
}
before = {(owner, name): getattr(owner, name) for owner in watched for name in watched[owner]}

from ep_serve import engine, plugin
from ep_serve.engine import class_names

plugin.register()
for module in pkgutil.walk_packages(engine.__path__, "ep_serve.engine."):
    if module.name != class_names.CPU_WORKER.rpartition(".")[0]:
        importlib.import_module(module.name)

from vllm.model_executor.models import ModelRegistry
from vllm.utils.import_utils import resolve_obj_by_qualname

from ep_serve.checkpoint.config import ARCHITECTURE, REDUCED_ARCHITECTURE

for name in (class_names.GPU_WORKER, class_names.SCHEDULER):
    resolve_obj_by_qualname(name)
for architecture in (ARCHITECTURE, REDUCED_ARCHITECTURE):
    ModelRegistry.models[architecture].load_model_cls()

after = {(owner, name): getattr(owner, name) for owner, name in before}
print("replaced:", [name for (_, name), was in before.items() if after[_, name] != was])
print("imported:", [name for name in sys.modules if name.startswith("vllm.v1.worker.cpu")])
"""


@pytest.mark.slow
def test_what_a_cuda_worker_imports_replaces_nothing_in_torch() -> None:
    done = subprocess.run([sys.executable, "-c", WORKER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["replaced: []", "imported: []"]
