"""Hostile bodies, uploads and HTTP itself."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator

import httpx

from tests.clips import make_image
from tests.gateway.abuse_scene import CLOSED, Scene, case
from tests.gateway.conftest import bearer

_statuses: tuple[int, ...]

BODIES: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "an empty body": (b"", (400,)),
    "a body that is not JSON": (b"hello", (400,)),
    "a body that is a list": (b"[]", (400,)),
    "nested lists": (b'{"a":' + b"[" * 500_000, (400,)),
    "nested objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, (400,)),
    "not a number": (b'{"keep_ratio": NaN}', (400,)),
    "an infinite number": (
        b'{"model":"m","messages":[{"role":"u"}],"keep_ratio":1e999}',
        (400,),
    ),
    "invalid UTF-8": (b'{"model": "\xff\xfe"}', (400,)),
    "half a surrogate": (b'{"model": "\\ud800"}', (400,)),
    "a number of many digits": (b'{"model":' + b"9" * 1_000_000 + b"}", (400,)),
    "a large body": (b'{"a":"' + b"x" * (4 << 20) + b'"}', (413,)),
}


def _add_body(name: str, content: bytes, statuses: tuple[int, ...]) -> None:
    @case(name, *statuses)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.body(content)


for _name, (_content, _statuses) in BODIES.items():
    _add_body(_name, _content, _statuses)


@case("a large body of unknown length", 413)
async def chunked(scene: Scene) -> httpx.Response:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b" " * 65_536

    return await scene.body(endless())


@case("a compressed body", 415)
async def compressed(scene: Scene) -> httpx.Response:
    body = gzip.compress(b'{"model": "mock", "a": "' + bytes(10_000_000) + b'"}')
    return await scene.body(body, **{"content-encoding": "gzip"})


@case("a form instead of JSON", 415)
async def wrong_type(scene: Scene) -> httpx.Response:
    return await scene.body(b"a=b", **{"content-type": "application/x-www-form-urlencoded"})


@case("a form for text", 415)
async def wrong_charset(scene: Scene) -> httpx.Response:
    return await scene.body(b"{}", **{"content-type": "text/plain; application/json"})


# -- files ------------------------------------------------------------------------------------


@case("another tenant's file", 404)
async def foreign_file(scene: Scene) -> httpx.Response:
    made = await scene.world.upload(make_image(), headers=bearer("b"))
    return await scene.ask([{"type": "file", "file": {"file_id": made.json()["id"]}}])


FILES = {
    "a path as a file": "../../../../etc/passwd",
    "a query as a file": "' OR 1=1 --",
    "a pattern as a file": "file-%",
}


def _add_file(name: str, file_id: str) -> None:
    @case(name, 404)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.ask([{"type": "file", "file": {"file_id": file_id}}])


for _name, _id in FILES.items():
    _add_file(_name, _id)


@case("a path in the path", 404)
async def path_in_path(scene: Scene) -> httpx.Response:
    url = "/v1/files/..%2f..%2fetc%2fpasswd/content"
    return await scene.world.client.get(url, headers=bearer("a"))


_HEAD = b'--x\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n'
FORMS: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "a form without a file": (_HEAD % (b"purpose", b"") + b"vision\r\n--x--\r\n", (400,)),
    "a form that is cut short": (_HEAD % (b"file", b'; filename="a"') + b"abc", (400,)),
    "a form of many fields": (_HEAD % (b"a", b"") * 1_000 + b"--x--\r\n", (400,)),
    "a form with a long field": (_HEAD % (b"a", b"") + b"a" * 100_000 + b"\r\n--x--\r\n", (400,)),
    "a form with a huge header": (b"--x\r\nA: " + b"a" * 100_000 + b"\r\n\r\n", (400,)),
    "a form with two files": (
        (_HEAD % (b"file", b'; filename="a"') + b"abc\r\n") * 2 + b"--x--\r\n",
        (400,),
    ),
    "a form that is none": (b"hello", (400,)),
    "a file that is too large": (
        _HEAD % (b"file", b'; filename="a"') + bytes(2 << 20) + b"\r\n--x--\r\n",
        (413,),
    ),
}


def _add_form(name: str, content: bytes, statuses: tuple[int, ...]) -> None:
    @case(name, *statuses)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.form(content)


for _name, (_content, _statuses) in FORMS.items():
    _add_form(_name, _content, _statuses)

# -- the protocol -----------------------------------------------------------------------------

_POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\n"
_AUTH = f"Authorization: {bearer('a')['authorization']}\r\n".encode()
_JSON = b"Content-Type: application/json\r\n"
RAW: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "no request line": (b"\x16\x03\x01\x02\x00\x01\x00" * 10 + b"\r\n\r\n", (400,)),
    "a huge header": (_POST + b"X: " + b"a" * 1_000_000, (400, CLOSED)),
    "many headers": (_POST + b"X: a\r\n" * 100_000, (400, CLOSED)),
    "a header that never ends": (_POST, (CLOSED,)),
    "a connection that says nothing": (b"", (CLOSED,)),
    "a body that never comes": (_POST + _AUTH + _JSON + b"Content-Length: 99\r\n\r\n", (408,)),
    "two lengths": (
        _POST + _AUTH + _JSON + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        (400,),
    ),
    "a length and chunks": (
        _POST + _AUTH + _JSON + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        (400,),
    ),
    "a negative length": (_POST + _AUTH + _JSON + b"Content-Length: -1\r\n\r\n", (400,)),
    "a strange encoding": (_POST + _AUTH + b"Transfer-Encoding: gzip\r\n\r\n", (400, 501)),
    "a full address as target": (
        b"GET http://127.0.0.1:9090/metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        (404,),
    ),
    "a path that climbs": (
        b"GET /v1/../metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        (404,),
    ),
    "a tunnel": (
        b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        (400, 404, 405, CLOSED),
    ),
}


def _add_raw(name: str, data: bytes, statuses: tuple[int, ...]) -> None:
    @case(name, *statuses)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.raw(data, patience=5)


for _name, (_raw, _statuses) in RAW.items():
    _add_raw(_name, _raw, _statuses)
