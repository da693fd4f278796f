"""A server in a process of its own: for the demo, for tests and for scripts that measure."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

START_SECONDS = 600.0
STOP_SECONDS = 60.0


class ServerError(RuntimeError):
    """The server did not start; the message ends with the last lines of its log."""


class ServerProcess:
    """`ep-serve serve` on a free port of the loopback interface, stopped when the context ends.

    Attributes:
        base_url: where the OpenAI API is, with `/v1`.
        log: file that holds everything the server printed.
        pid: of the server's main process, once started.
    """

    def __init__(
        self,
        checkpoint: Path,
        options: Sequence[str] = (),
        *,
        log: Path,
        module: Sequence[str] = ("-m", "ep_serve", "serve"),
        environment: dict[str, str] | None = None,
        progress: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.port = _free_port()
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self.log = log
        address = ["--host", "127.0.0.1", "--port", str(self.port)]
        self._command = [sys.executable, *module, str(checkpoint), *address, *options]
        self._environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", **(environment or {})}
        self._progress = progress
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """SIGTERM, and after `STOP_SECONDS` SIGKILL for it and its children; the exit code."""
        process = self._process
        assert process is not None, "the server was not started"
        if process.poll() is None:
            process.terminate()
        return self.wait()

    def wait(self) -> int:
        """Wait at most `STOP_SECONDS` for the process to exit; return its exit code."""
        process = self._process
        assert process is not None, "the server was not started"
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()

    def _wait_until_healthy(self) -> None:
        began = time.monotonic()
        assert self._process is not None
        while not _answers(self.port):
            waited = time.monotonic() - began
            if self._process.poll() is not None or waited > START_SECONDS:
                reason = "ended" if self._process.poll() is not None else "is not healthy"
                tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])
                raise ServerError(f"the server {reason} after {waited:.0f} s:\n{tail}")
            self._progress(waited)
            time.sleep(0.5)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
