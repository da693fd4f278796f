"""How a server starts, refuses to start, and ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ep_serve.checkpoint.embedded import build
from ep_serve.cli import main
from ep_serve.engine.server.process import ServerProcess
from tests.engine.client import Client, text, user

pytestmark = pytest.mark.engine

OPTIONS = ("--max-model-len", "2048", "--enforce-eager", "--served-model-name", "golden")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("model") / "embedded")


@pytest.fixture
def server(
    embedded: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[ServerProcess]:
    options = (*OPTIONS, *getattr(request, "param", ()))
    with ServerProcess(embedded, options, log=tmp_path / "log") as process:
        yield process


def stop_in_mid_stream(server: ServerProcess, max_tokens: int) -> list[str]:
    """Send SIGTERM when a stream has begun; all its events."""
    client = Client(server)
    body = {
        "model": "golden",
        "messages": user(text("Hello")),
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    url = f"{client.root}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(server.pid, signal.SIGTERM)
        while httpx.get(f"{client.root}/health").status_code != 503:
            time.sleep(0.05)
        late = httpx.post(url, json=body)
        events = [line.removeprefix("data: ") for line in lines if line]
    assert late.status_code == 503
    assert late.json()["error"]["message"].startswith("The server is stopping")
    began = time.monotonic()
    assert server.wait() == 0
    assert time.monotonic() - began < 30
    return events


@pytest.mark.parametrize("server", [("--shutdown-timeout", "240")], indirect=True)
def test_sigterm_lets_a_running_stream_finish(server: ServerProcess) -> None:
    events = stop_in_mid_stream(server, max_tokens=500)
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("server", [("--shutdown-timeout", "1")], indirect=True)
def test_a_stream_that_exceeds_the_drain_time_ends_with_an_abort(server: ServerProcess) -> None:
    events = stop_in_mid_stream(server, max_tokens=1500)
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "abort"


def test_a_checkpoint_that_contradicts_itself_is_refused_in_a_sentence(
    embedded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(embedded, broken)
    config = json.loads((broken / "config.json").read_text())
    config["thinker_config"]["text_config"]["sync_rope_section"] = [1, 2, 3]
    (broken / "config.json").write_text(json.dumps(config))
    assert main(["serve", str(broken)]) == 1
    message = capsys.readouterr().err
    assert "sync_rope_section" in message
    assert len(message.splitlines()) == 1


def test_a_setting_that_cannot_work_is_refused_in_a_sentence(embedded: Path) -> None:
    options = ("--pipeline-parallel-size", "2", "--port", "0")
    done = subprocess.run(
        [sys.executable, "-m", "ep_serve", "serve", str(embedded), *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ep-serve: --pipeline-parallel-size must be 1")
    assert "Traceback" not in done.stderr
