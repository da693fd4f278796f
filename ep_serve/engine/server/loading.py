"""SIGTERM and SIGINT end a server that is still loading, and all its processes, at once.

No request runs yet, so nothing has to be drained. vLLM 0.32 raises an exception in its main thread
upon SIGTERM and relies on it to unwind everything; SIGINT cancels a task that is resumed only when
the model is loaded; and its engine processes only note a signal while they load. Process 1 of a
container would ignore both signals until vLLM installs its handlers.
"""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """In the block, SIGTERM and SIGINT exit with 128 + their number unless handled otherwise."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    _handle(dict.fromkeys(SIGNALS, _end))
    try:
        yield
    finally:
        _handle(before)


def _handle(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    kill_descendants(os.getpid())
    os._exit(128 + number)


def kill_descendants(pid: int) -> None:
    """Kill the children of a process and theirs, also those that they are just starting."""
    found: set[psutil.Process] = set()
    with suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        # Stopped first: a child that is killed would leave unseen what it started meanwhile.
        while new := set(root.children(recursive=True)) - found:
            found |= new
            for child in new:
                with suppress(psutil.Error):
                    if not _releases_memory(child):
                        child.suspend()
    for child in found:
        with suppress(psutil.Error):
            if not _releases_memory(child):
                child.kill()


def _releases_memory(process: psutil.Process) -> bool:
    # It removes what others left in shared memory when the last of them has ended, then ends too.
    return any("multiprocessing.resource_tracker" in word for word in process.cmdline())


def exit_on_signal_until_loaded(server: Any) -> None:
    """Delay vLLM's signal handlers until the model is loaded.

    Args:
        server: the module of vLLM's single API server. It handles SIGTERM, calls `setup_server`,
            loads, and then installs handlers for both signals.
    """
    set_up = server.setup_server

    def setup_server(*args: Any, **kwargs: Any) -> Any:
        _handle(dict.fromkeys(SIGNALS, _end))
        return set_up(*args, **kwargs)

    server.setup_server = setup_server
