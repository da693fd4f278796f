"""Where hostile requests are played, and the table they are entered in."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.gateway.conftest import World, bearer

CLOSED = 599
"""Stands for a connection that was closed without a word."""


@dataclass
class Scene:
    """Where a case plays: `evil` is a host the gateway may fetch from, `trap` one it must not."""

    world: World
    evil: str
    trap_port: int
    hits: list[str] = field(default_factory=list)

    async def ask(self, content: Any, **fields: Any) -> httpx.Response:
        fields.setdefault("headers", bearer("a"))
        return await self.world.ask(content, **fields)

    async def medium(self, kind: str, url: str) -> httpx.Response:
        return await self.ask([{"type": kind, kind: {"url": url}}])

    async def body(self, content: Any, **headers: str) -> httpx.Response:
        given = {"content-type": "application/json", **bearer("a"), **headers}
        return await self.world.client.post("/v1/chat/completions", content=content, headers=given)

    async def form(self, content: bytes, boundary: str = "x") -> httpx.Response:
        kind = f"multipart/form-data; boundary={boundary}"
        headers = {"content-type": kind, **bearer("a")}
        return await self.world.client.post("/v1/files", content=content, headers=headers)

    async def raw(self, data: bytes, patience: float = 3) -> httpx.Response:
        """Send bytes, and read until the gateway closes; `CLOSED` if it says nothing."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.world.now.port)
        try:
            writer.write(data)
            answer = b""
            with suppress(ConnectionError):
                async with asyncio.timeout(patience):
                    while data := await reader.read(65_536):
                        answer += data
        except TimeoutError:
            pytest.fail(f"the connection stays open after {answer!r}")
        finally:
            writer.close()
        head, _, content = answer.partition(b"\r\n\r\n")
        status = int(head.split()[1]) if head else CLOSED
        return httpx.Response(status, content=content)


Case = Callable[[Scene], Coroutine[Any, Any, httpx.Response]]
CASES: dict[str, tuple[Case, tuple[int, ...]]] = {}


def case(name: str, *statuses: int) -> Callable[[Case], Case]:
    def add(made: Case) -> Case:
        assert name not in CASES
        CASES[name] = made, statuses
        return made

    return add


def inline(data: bytes) -> str:
    """A data URL."""
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


def leftovers(world: World) -> list[str]:
    """What requests hold; nothing once all have ended."""
    media, limits = world.gateway.media, world.gateway.limits
    store = media.store
    found = {
        "media in use": list(store._in_use._users),
        "bytes in use": store._in_use.nbytes,
        "reserved bytes": store._index.reserved,
        "files being received": [path.name for path in store._incoming.iterdir()],
        "bytes on disk that are not counted": store.used_bytes
        - sum(path.stat().st_size for path in store._blobs.glob("*/*")),
        "lent media": list(media.server._paths),
        "running requests": +limits._running,
        "requests at engines": sum(one.active for one in world.gateway.upstreams.all),
    }
    found["slots to fetch"] = +media._fetching._held
    found["slots to probe"] = +media.prober._slots._held
    found["turns to read"] = +world.gateway.bodies._turns._held
    found["memory of bodies"] = world.gateway.bodies.quota.used_bytes
    return [f"{what}: {value}" for what, value in found.items() if value]


async def settled(world: World) -> None:
    """Wait until nothing is left of the requests that have ended.

    Raises:
        AssertionError: something stays.
    """
    for _ in range(600):
        if not leftovers(world):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("\n".join(leftovers(world)))
