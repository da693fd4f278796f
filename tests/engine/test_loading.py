"""A server that is told to stop while it loads is gone at once, with all that it started."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ep_serve.checkpoint.embedded import build

SECONDS = 15
"""From the signal to the end of the last process."""

STUBBORN = """
import os, signal, subprocess, sys, time

if len(sys.argv) == 1:
    from ep_serve.engine.server.loading import exit_on_signal

    with exit_on_signal():
        subprocess.Popen([sys.executable, __file__, "child"])
        time.sleep(600)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
if sys.argv[1] == "child":
    subprocess.Popen([sys.executable, __file__, "grandchild"])
print("ready", flush=True)
time.sleep(600)
"""


class Family:
    """A process and all its descendants."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self._root = psutil.Process(process.pid)
        self.seen: set[psutil.Process] = set()

    def look(self) -> list[str]:
        """Note the processes that are there; their command lines."""
        self.seen |= set(self._root.children(recursive=True))
        return [self._name(process) for process in self.seen]

    def alive(self) -> list[str]:
        """Of those that were noted."""
        return [
            self._name(process)
            for process in self.seen
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ]

    @staticmethod
    def _name(process: psutil.Process) -> str:
        try:
            return " ".join(process.cmdline())
        except psutil.Error:
            return ""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Family]]:
    families: list[Family] = []

    def run(*command: str) -> Family:
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=log, stderr=log, start_new_session=True
            )
        families.append(Family(process))
        return families[-1]

    yield run
    for family in families:
        for process in (family.process, *family.seen):
            if process.poll() is None if process is family.process else process.is_running():
                process.kill()
        family.process.wait()


def signalled(family: Family, number: signal.Signals, ready: Callable[[list[str]], bool]) -> int:
    """Send a signal when `ready` says so of the command lines, and wait for the end of all."""
    while not ready(family.look()):
        assert family.process.poll() is None, "ended before it was ready"
        time.sleep(0.05)
    family.process.send_signal(number)
    code = family.process.wait(SECONDS)
    deadline = time.monotonic() + SECONDS
    while family.alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert family.alive() == []
    return code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_children_that_ignore_signals_end_too(
    start: Callable[..., Family], tmp_path: Path, number: signal.Signals
) -> None:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    family = start(str(script))
    log = tmp_path / "log"
    code = signalled(family, number, lambda words: log.read_text().count("ready") == 2)
    assert len(family.seen) == 2
    assert code == 128 + number


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("loading") / "model")


@pytest.mark.engine
@pytest.mark.parametrize(
    ("number", "child", "options", "code"),
    [
        (signal.SIGINT, "VLLM::Worker", (), 130),
        (signal.SIGTERM, "VLLM::EngineCore", ("--gateway", "--port", "0"), 0),
    ],
    ids=["alone", "gateway"],
)
def test_a_server_that_loads_ends_at_once(
    start: Callable[..., Family],
    embedded: Path,
    number: signal.Signals,
    child: str,
    options: tuple[str, ...],
    code: int,
) -> None:
    family = start("-m", "ep_serve", "serve", str(embedded), "--max-model-len", "2048", *options)
    assert signalled(family, number, lambda words: any(child in line for line in words)) == code
