"""`ep-serve serve --gateway`: an engine on the loopback interface and the gateway in front of it.

Both are processes of their own, as they are in a cluster. When one of them ends, so does the other;
SIGTERM reaches the gateway first, so that it can finish what is running while the engine still can.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from ep_serve.engine.server.loading import kill_descendants

POLL_SECONDS = 0.2
STOP_SECONDS = 900.0
"""A process that has not ended this long after SIGTERM is killed. The gateway lets running streams
finish and has a bound of its own for it, 305 s if `drain` is not set."""


def serve_with_gateway(
    checkpoint: str, engine_options: Sequence[str], gateway_options: Sequence[str]
) -> int:
    """Run both until one ends or SIGTERM comes; a second SIGTERM ends the running streams too.

    Args:
        checkpoint: what the engine serves.
        engine_options: options of `ep-serve serve`, without `--host` and `--port`.
        gateway_options: options of `ep-serve gateway`, without `--upstream`.

    Returns:
        0 if it was told to stop, else the exit code of the process that ended.
    """
    port = str(_free_port())
    command = [sys.executable, "-m", "ep_serve"]
    address = ["--host", "127.0.0.1", "--port", port]
    upstream = ["--upstream", f"http://127.0.0.1:{port}"]
    stop = _Stop()
    processes: list[subprocess.Popen[bytes]] = []
    code = 0
    try:
        for options in (
            ["serve", checkpoint, *engine_options, *address],
            ["gateway", *upstream, *gateway_options],
        ):
            processes.append(subprocess.Popen([*command, *options]))
        while not stop.signals and not any(process.poll() is not None for process in processes):
            time.sleep(POLL_SECONDS)
        code = next((ended for process in processes if (ended := process.poll())), 0)
    finally:  # also when the second one could not be started
        for process in reversed(processes):
            _end(process, stop)
    return 0 if stop.signals else code or 1


class _Stop:
    """Counts SIGTERM and SIGINT."""

    def __init__(self) -> None:
        self.signals = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._count)

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.signals += 1


def _end(process: subprocess.Popen[bytes], stop: _Stop) -> None:
    process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    hurried = False
    while process.poll() is None:
        if stop.signals > 1 and not hurried:
            hurried = True
            process.terminate()
        if time.monotonic() > deadline:
            kill_descendants(process.pid)
            process.kill()
        time.sleep(POLL_SECONDS)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def split_options(words: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command line: the options with these names and their values, and all the rest."""
    chosen: list[str] = []
    rest: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if word.partition("=")[0] not in names:
            rest.append(word)
        elif "=" in word:
            chosen.append(word)
        else:
            chosen += [word, *(value for value in [next(waiting, None)] if value is not None)]
    return chosen, rest
