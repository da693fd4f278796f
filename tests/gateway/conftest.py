"""Fixtures: a gateway on a real port in front of mock engines, and a mock bucket."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from ep_serve.gateway.gateway import Gateway
from ep_serve.gateway.keys import new_key
from ep_serve.gateway.server import RunningGateway, running
from ep_serve.gateway.settings import load
from tests.gateway.mock_upstream import MODEL, MockUpstream

if TYPE_CHECKING:
    from tests.gateway.bucket import Server

FAST = {
    "routing": {
        "health_interval_s": 0.2,
        "health_timeout_s": 0.5,
        "dns_interval_s": 0.2,
        "connect_timeout_s": 0.5,
        "first_byte_timeout_s": 2.0,
        "idle_timeout_s": 1.0,
        "breaker_reset_s": 0.5,
    },
    "drain": {"delay_s": 0.3, "timeout_s": 10},
    "queue": {"timeout_s": 1.0},
    "metrics": {"enabled": False},
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class World:
    """A gateway, a client for it, and the engines behind it."""

    now: RunningGateway
    client: httpx.AsyncClient
    engines: list[MockUpstream]

    @property
    def gateway(self) -> Gateway:
        return self.now.gateway

    @property
    def engine(self) -> MockUpstream:
        return self.engines[0]

    async def ask(self, content: Any = "Hello", **fields: Any) -> httpx.Response:
        """One chat request, not streamed."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        headers = body.pop("headers", {})
        return await self.client.post("/v1/chat/completions", json=body, headers=headers)

    @asynccontextmanager
    async def stream(self, content: Any = "Hello", **fields: Any) -> AsyncIterator[httpx.Response]:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}
        headers = body.pop("headers", {})
        async with self.client.stream(
            "POST", "/v1/chat/completions", json={**body, "stream": True}, headers=headers
        ) as response:
            yield response

    async def upload(self, data: bytes, name: str = "a.png", **options: Any) -> httpx.Response:
        return await self.client.post(
            "/v1/files", files={"file": (name, data)}, data={"purpose": "vision"}, **options
        )


MakeWorld = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def world(tmp_path: Path) -> MakeWorld:
    """A function that makes a `World`: number of engines, keys, sections of settings."""

    @asynccontextmanager
    async def make(
        engines: int | list[MockUpstream] = 1,
        keys: list[dict[str, Any]] | None = None,
        **settings: Any,
    ) -> AsyncIterator[World]:
        mocks = [MockUpstream() for _ in range(engines)] if isinstance(engines, int) else engines
        for mock in mocks:
            await mock.start()
        options: dict[str, Any] = {
            "upstreams": [mock.url for mock in mocks],
            "port": 0,
        }
        if keys is not None:
            options["keys_file"] = write_keys(tmp_path / "keys.yaml", keys)
        config = tmp_path / "gateway.yaml"
        below = {**FAST, "store": {"path": str(tmp_path / "store")}}
        config.write_text(yaml.safe_dump(_merge(below, settings)))
        try:
            async with running(load(config, options)) as now:
                base = f"http://127.0.0.1:{now.port}"
                limits = httpx.Limits(max_connections=None)
                async with httpx.AsyncClient(base_url=base, timeout=20, limits=limits) as client:
                    yield World(now, client, mocks)
        finally:
            for mock in mocks:
                await mock.stop()

    return make


@asynccontextmanager
async def gateway_process(
    folder: Path, engine: MockUpstream, **settings: Any
) -> AsyncIterator[tuple[asyncio.subprocess.Process, int]]:
    """A gateway in a process of its own, and its port; killed at the end if it still runs."""
    config = folder / "process.yaml"
    options = {"upstreams": [engine.url], "port": 0, "store": {"path": str(folder / "store")}}
    config.write_text(yaml.safe_dump(_merge(_merge(FAST, options), settings)))
    code = (
        "import argparse, sys; from ep_serve.gateway.command import add_options, run; "
        "p = argparse.ArgumentParser(); add_options(p); sys.exit(run(p.parse_args()))"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code, "--config", str(config)), stderr=asyncio.subprocess.PIPE
    )
    assert process.stderr is not None
    port = 0
    while not port:
        port = json.loads(await process.stderr.readline()).get("port", 0)
    reading = asyncio.create_task(process.stderr.read())
    try:
        yield process, port
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await reading


def write_keys(path: Path, keys: list[dict[str, Any]]) -> Path:
    """A key file; an entry without a digest gets that of `secret(name)`."""
    entries = [{"sha256": _digest(entry["name"]), **entry} for entry in keys]
    path.write_text(yaml.safe_dump({"keys": entries}))
    return path


def bearer(name: str) -> dict[str, str]:
    """The header of a key made by `write_keys`."""
    return {"authorization": f"Bearer {_secret(name)}"}


_secrets: dict[str, tuple[str, str]] = {}


def _secret(name: str) -> str:
    if name not in _secrets:
        key, entry = new_key(name)
        _secrets[name] = key, yaml.safe_load(entry)["keys"][0]["sha256"]
    return _secrets[name][0]


def _digest(name: str) -> str:
    _secret(name)
    return _secrets[name][1]


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        both = isinstance(merged.get(name), dict) and isinstance(value, dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    from tests.gateway.bucket import running_server  # it imports this module

    with running_server() as server:
        yield server


@pytest.fixture
def another_server() -> Iterator[Server]:
    """To stop in the middle of a test."""
    from tests.gateway.bucket import running_server  # it imports this module

    with running_server() as server:
        yield server


@pytest.fixture
def bucket(server: Server) -> Server:
    server.empty()
    return server
