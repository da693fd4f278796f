"""Data-parallel training with one-thread processes, faster on CPUs than one multi-threaded process.

Each process computes the gradient of its own batch; all of them step along the mean, so that their
weights stay equal.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing import parent_process
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

MALLOC_SETTINGS = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""Environment of the processes: glibc keeps freed memory.

A step frees and reallocates hundreds of megabytes. If they are returned to the system in between,
page faults are a large part of the step.
"""


def run_data_parallel(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Call `work(rank, *arguments)` in `processes` processes, and wait for all of them."""
    if processes == 1:
        torch.set_num_threads(1)
        work(0, *arguments)
        return
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with _environment(
        {name: value for name, value in MALLOC_SETTINGS.items() if name not in os.environ}
    ):
        spawn(_start_rank, (work, processes, port, *arguments), nprocs=processes)


def average_gradients(module: nn.Module) -> None:
    """Average the gradients over all processes, in place."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes started inside of the context."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def _start_rank(
    rank: int, work: Callable[..., None], processes: int, port: int, *arguments: Any
) -> None:
    torch.set_num_threads(1)
    _exit_with_parent()
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def _exit_with_parent() -> None:
    """Exit when the parent process ends, so that killing a training ends all of it."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
