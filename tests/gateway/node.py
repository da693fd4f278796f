"""`ep-serve serve --gateway` as a test has it: the real engine, and the gateway in front of it."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml
from openai import OpenAI

from ep_serve.checkpoint.embedded import build
from ep_serve.engine.server.process import ServerProcess
from tests.engine.client import metric
from tests.gateway.conftest import bearer, write_keys

MODEL = "embedded"
TENANTS = ("anna", "ben")
READY_SECONDS = 240
ENGINE_OPTIONS = (
    "--served-model-name",
    MODEL,
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "2048",
    "--block-size",
    "32",
    "--kv-cache-memory-bytes",
    str(256 << 20),
    "--enable-auto-tool-choice",
    "--tool-call-parser",
    "hermes",
    # Random weights would fill a JSON answer with white space up to its limit.
    "--structured-outputs-config",
    '{"backend": "xgrammar", "disable_any_whitespace": true}',
)


@dataclass(frozen=True)
class Node:
    """What runs; the engine's address is the one that the gateway reports."""

    process: ServerProcess
    engine: str
    """Root URL of the engine, which clients of a node never see."""
    web: Path
    """Folder of a web server on this machine."""
    web_url: str

    @property
    def gateway(self) -> str:
        return self.process.base_url.removesuffix("/v1")

    @cached_property
    def direct(self) -> OpenAI:
        """The official client, past the gateway."""
        return OpenAI(base_url=f"{self.engine}/v1", api_key="none", max_retries=0, timeout=120)

    def through(self, tenant: str = TENANTS[0]) -> OpenAI:
        """The official client as people use it."""
        return OpenAI(**self.options(tenant))

    def options(self, tenant: str = TENANTS[0]) -> dict[str, Any]:
        key = bearer(tenant)["authorization"].removeprefix("Bearer ")
        return {"base_url": f"{self.gateway}/v1", "api_key": key, "max_retries": 0, "timeout": 120}

    def metric(self, name: str, **labels: str) -> float:
        """The sum over the series of one of the engine's metrics."""
        return metric(self.engine, name, **labels)

    def terminate(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)


@contextmanager
def node(folder: Path) -> Iterator[Node]:
    """Start everything; about as long as an engine takes."""
    web = folder / "web"
    web.mkdir()
    metrics_port = free_port()
    with _serving_files(web) as web_port:
        config = folder / "gateway.yaml"
        settings = {
            "keys_file": str(write_keys(folder / "keys.yaml", [{"name": n} for n in TENANTS])),
            "store": {"path": str(folder / "store")},
            "metrics": {"port": metrics_port},
            "media": {"fetch": {"ports": [web_port], "allow_networks": ["127.0.0.0/8"]}},
            "drain": {"delay_s": 0.5},
        }
        config.write_text(yaml.safe_dump(settings))
        options = ["--gateway", "--gateway-config", str(config), *ENGINE_OPTIONS]
        environment = {"HF_HUB_OFFLINE": "1"}
        checkpoint = build(folder / "embedded")
        with ServerProcess(
            checkpoint, options, log=folder / "log", environment=environment
        ) as process:
            _wait_until_ready(process)
            engine = _engine_behind(metrics_port)
            yield Node(process, engine, web, f"http://127.0.0.1:{web_port}")


def _wait_until_ready(process: ServerProcess) -> None:
    url = process.base_url.removesuffix("/v1") + "/ready"
    deadline = time.monotonic() + READY_SECONDS
    try:
        while httpx.get(url).status_code != 200:
            assert time.monotonic() < deadline, "no engine became ready"
            time.sleep(0.5)
    except Exception:
        print(process.log.read_text(errors="replace")[-4_000:])
        raise


def _engine_behind(metrics_port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics") as answer:
        series = answer.read().decode()
    (address,) = re.findall(r'ep_serve_gateway_upstream_up\{upstream="([^"]+)"\} 1', series)
    return f"http://{address}"


@contextmanager
def _serving_files(folder: Path) -> Iterator[int]:
    handler = partial(_Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: Any) -> None:
        pass


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
