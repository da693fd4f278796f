from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from ep_serve.node import serve_with_gateway, split_options


@pytest.fixture
def _signals() -> Iterator[None]:
    """`serve_with_gateway` takes them for its process, which is that of the tests here."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_an_engine_whose_gateway_cannot_be_started_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str]) -> Any:
        if started:
            raise OSError("no more processes")
        started.append(popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        return started[0]

    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(OSError, match="no more processes"):
        serve_with_gateway("model", [], [])
    assert started[0].poll() == -signal.SIGTERM


def test_options_are_parted_from_the_rest_with_their_values() -> None:
    words = ["--dtype", "float32", "--port", "80", "--host=::1", "--enforce-eager"]
    chosen, rest = split_options(words, ["--host", "--port"])
    assert chosen == ["--port", "80", "--host=::1"]
    assert rest == ["--dtype", "float32", "--enforce-eager"]


def test_a_name_without_its_value_is_left_to_the_one_who_reads_it() -> None:
    assert split_options(["--port"], ["--port"]) == (["--port"], [])
