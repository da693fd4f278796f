"""Several one-thread processes that train one model: faster than one process with several threads.

Each computes the gradient of its own batch; their mean is what all of them step along, so that
their weights stay equal.
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

MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
"""For glibc, from the start of a process on: keep memory that is freed.

A step frees hundreds of megabytes and asks for them again at once. Where they are handed back to
the system in between, page faults are a large part of a step.
"""


def train_together(work: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Call `work(rank, *arguments)` in `processes` processes, and wait for all of them."""
    if processes == 1:
        torch.set_num_threads(1)
        work(0, *arguments)
        return
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with _environment({name: value for name, value in MEMORY.items() if name not in os.environ}):
        spawn(_begin, (work, processes, port, *arguments), nprocs=processes)


def share_gradients(module: nn.Module) -> None:
    """Give every process the mean of all gradients."""
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
    """Variables that are not set, for the processes that are started meanwhile."""
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            del os.environ[name]


def _begin(
    rank: int, work: Callable[..., None], processes: int, port: int, *arguments: Any
) -> None:
    torch.set_num_threads(1)
    _end_with_parent()
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=processes)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def _end_with_parent() -> None:
    """A training that is killed must not go on in its processes."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
