"""Hostile requests that want something fetched."""

from __future__ import annotations

import asyncio
import gzip
from typing import Any

import httpx
from aiohttp import abc, web

from ep_serve.gateway.media.fetch.fetcher import Fetcher
from tests.gateway.abuse_scene import Scene, case

TRAP = web.AppKey("trap", int)

FORBIDDEN = [
    *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001"),
    *("127.0.0.1.", "0", "0.0.0.0", "localhost", "localhost.", "LOCALHOST", "127.255.255.254"),
    *("[::1]", "[::]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[::127.0.0.1]"),
    *("[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[fe80::1]", "[fd00:ec2::254]", "[ff02::1]"),
    *("169.254.169.254", "10.0.0.1", "192.168.0.1", "172.16.0.1", "100.100.100.200"),
    *("168.63.129.16", "224.0.0.1", "\u2460\u2461\u2466.0.0.1", "127。0。0。1"),
]


def _add_address(host: str) -> None:
    @case(f"fetch from {host}", 400)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.medium("video_url", f"http://{host}:{scene.trap_port}/a.mp4")


for _host in FORBIDDEN:
    _add_address(_host)

URLS = {
    "file": "file:///etc/passwd",
    "file in a data part": "file://localhost/etc/hosts",
    "ftp": "ftp://example.org/a.mp4",
    "no scheme": "/etc/passwd",
    "user": "http://user:pass@127.0.0.1:{trap}/",
    "empty user": "http://@127.0.0.1:{trap}/",
    "backslash": "http://example.org\\@127.0.0.1:{trap}/",
    "line break": "http://127.0.0.1:{trap}/\r\nX: y",
    "port of ssh": "http://example.org:22/",
    "long": "http://example.org/" + "a" * 10_000,
    "zone": "http://[fe80::1%25lo]:{trap}/",
}


def _add_url(name: str, url: str) -> None:
    @case(f"url with {name}", 400)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.medium("image_url", url.format(trap=scene.trap_port))


for _name, _url in URLS.items():
    _add_url(_name, _url)

REDIRECTS = {
    "private space": ("http://127.0.0.1:{trap}/", 400),
    "a decimal address": ("http://2130706433:{trap}/", 400),
    "a private name": ("http://localhost:{trap}/", 400),
    "metadata": ("http://169.254.169.254/latest/", 400),
    "a file": ("file:///etc/passwd", 400),
    "a user": ("http://u:p@127.0.0.2/", 400),
    "itself": ("{evil}/redirect/itself", 400),
    "a name that changes": ("http://rebound.example:{trap}/", 400),
    "nowhere": ("", 422),
}


def _add_redirect(name: str, status: int) -> None:
    @case(f"redirect to {name}", status)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.medium("video_url", f"{scene.evil}/redirect/{name.replace(' ', '-')}")


for _name, (_, _status) in REDIRECTS.items():
    _add_redirect(_name, _status)


REBINDING = "a name that is rebound after it was checked"


@case(REBINDING, 400)
async def rebinding(scene: Scene) -> httpx.Response:
    media = scene.world.gateway.media
    old = media.fetcher
    resolver = Rebinding()
    media.fetcher = Fetcher(scene.world.gateway.settings.media, resolver)
    await media.fetcher.open()
    port = scene.evil.rpartition(":")[2]
    try:
        url = f"http://rebound.example:{port}/redirect/a-name-that-changes"
        answer = await scene.medium("video_url", url)
        assert resolver.asked == 2  # the first address was fetched from
        return answer
    finally:
        await media.fetcher.close()
        media.fetcher = old


class Rebinding(abc.AbstractResolver):
    """Names an allowed address to whoever looks first, and loopback from then on."""

    asked = 0

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[Any]:
        self.asked += 1
        address = "127.0.0.2" if self.asked == 1 else "127.0.0.1"
        return [
            {"hostname": host, "host": address, "port": port, "family": 2, "proto": 0, "flags": 0}
        ]

    async def close(self) -> None:
        """Nothing to close."""


# -- servers that misbehave -------------------------------------------------------------------

SERVERS: dict[str, tuple[int, ...]] = {
    "endless": (413,),
    "announces-too-much": (413,),
    "slow": (422,),
    "silent": (422,),
    "gzip": (422,),
    "missing": (422,),
    "html": (415,),
    "huge-header": (422,),
    "cut-short": (422,),
    "empty": (422,),
}


def _add_server(name: str, statuses: tuple[int, ...]) -> None:
    @case(f"a server that is {name}", *statuses)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.medium("video_url", f"{scene.evil}/{name}")


for _name, _statuses in SERVERS.items():
    _add_server(_name, _statuses)


async def misbehave(request: web.Request) -> web.StreamResponse:
    name = request.path.removeprefix("/")
    if name.startswith("redirect/"):
        target = REDIRECTS[name.removeprefix("redirect/").replace("-", " ")][0]
        host = f"http://{request.host}"
        target = target.format(trap=request.app[TRAP], evil=host)
        return web.Response(status=302, headers={"location": target} if target else {})
    if name == "gzip":
        body = gzip.compress(bytes(200_000_000 // 100))
        return web.Response(body=body, headers={"content-encoding": "gzip"})
    if name == "missing":
        return web.Response(status=404)
    if name == "html":
        return web.Response(text="<html>hello</html>" * 100, content_type="text/html")
    if name == "huge-header":
        return web.Response(headers={"x-a": "a" * 100_000})
    if name == "empty":
        return web.Response()
    response = web.StreamResponse()
    if name == "announces-too-much":
        response.content_length = 10 << 30
    if name == "cut-short":
        response.content_length = 1_000
    if name == "silent":
        await asyncio.sleep(60)
    await response.prepare(request)
    for _ in range(1_000):
        await response.write(b"\0" * (65_536 if name == "endless" else 10))
        if name == "slow":
            await asyncio.sleep(0.1)
        if name == "cut-short":
            assert request.transport is not None
            request.transport.abort()
            return response
    return response
