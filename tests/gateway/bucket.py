"""A server that speaks S3, for the tests of files that several gateways share."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from obstore.store import S3Store

from tests.gateway.node import free_port

if TYPE_CHECKING:
    from obstore.store import S3Config

KEYS: S3Config = {"access_key_id": "test", "secret_access_key": "a-secret-of-the-bucket"}
START_SECONDS = 120


@dataclass
class Server:
    """A server that speaks S3; `bucket` is empty at the beginning of a test.

    It is a process of its own: inside the tests' process its web framework would break what looks
    at every loaded module, as the engine does when it loads its kernels.
    """

    port: int
    process: subprocess.Popen[bytes]
    bucket: str = "media"

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return self.empty()
            except httpx.TransportError:
                assert self.process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server does not listen"
                time.sleep(0.1)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def settings(self) -> dict[str, Any]:
        return {"bucket": self.bucket, "endpoint": self.url, "timeout_s": 20, **KEYS}

    @property
    def raw(self) -> S3Store:
        """What anybody may do who has the keys."""
        return S3Store(
            self.bucket,
            config={"endpoint": self.url, "region": "us-east-1", **KEYS},
            client_options={"allow_http": True},
        )

    def empty(self) -> None:
        """One bucket with nothing in it."""
        httpx.post(f"{self.url}/moto-api/reset", timeout=20).raise_for_status()
        httpx.put(f"{self.url}/{self.bucket}", timeout=20).raise_for_status()

    def objects(self) -> dict[str, int]:
        """Sizes by name."""
        return {item["path"]: item["size"] for item in self.raw.list().collect()}

    def blobs(self) -> dict[str, int]:
        found = {name: size for name, size in self.objects().items() if name.startswith("blobs/")}
        return {name.rpartition("/")[2]: size for name, size in found.items()}


@contextmanager
def running_server() -> Iterator[Server]:
    """Start one; it ends with the context, or before when that is what a test is about."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    server = Server(port, process)
    try:
        server.wait_until_it_answers()
        yield server
    finally:
        server.stop()
