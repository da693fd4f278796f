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
_LONG = b"a" * 60_000
_GET = b"GET /v1/models HTTP/1.1\r\n"
_HOST = b"Host: a\r\n"
_CHUNKED = _POST + _AUTH + _JSON + b"Transfer-Encoding: chunked\r\n\r\n"
_END = b"Connection: close\r\n\r\n"
RAW: dict[str, tuple[bytes, tuple[int, ...]]] = {
    "no request line": (b"\x16\x03\x01\x02\x00\x01\x00" * 10 + b"\r\n\r\n", (400,)),
    "a huge header": (_POST + b"X: " + b"a" * 1_000_000, (431,)),
    "a large header at once": (_POST + _AUTH + b"X: " + _LONG + b"\r\n" + _END, (431,)),
    "many headers": (_POST + b"X: a\r\n" * 100_000, (431,)),
    "a long target": (b"GET /" + _LONG + b" HTTP/1.1\r\n" + _HOST + _END, (414,)),
    "a target without end": (b"GET /" + b"a" * 1_000_000, (414, 431)),
    "empty lines without end": (b"\r\n" * 100_000, (431,)),
    "a header that never ends": (_POST, (408,)),
    "a connection that says nothing": (b"", (CLOSED,)),
    "a body that never comes": (_POST + _AUTH + _JSON + b"Content-Length: 99\r\n\r\n", (408,)),
    "two lengths": (
        _POST + _AUTH + _JSON + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
        (400,),
    ),
    "the same length twice": (
        _POST + _AUTH + _JSON + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
        (400,),
    ),
    "a list of lengths": (_POST + _AUTH + _JSON + b"Content-Length: 2, 2\r\n\r\n{}", (400,)),
    "a length and chunks": (
        _POST + _AUTH + _JSON + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        (400,),
    ),
    "chunks and a length": (
        _POST + _AUTH + _JSON + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
        (400,),
    ),
    "a negative length": (_POST + _AUTH + _JSON + b"Content-Length: -1\r\n\r\n", (400,)),
    "a length with a sign": (_POST + _AUTH + _JSON + b"Content-Length: +2\r\n\r\n{}", (400,)),
    "a strange encoding": (_POST + _AUTH + b"Transfer-Encoding: gzip\r\n\r\n", (501,)),
    "a strange encoding in chunks": (
        _POST + _AUTH + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        (501,),
    ),
    "two encodings": (
        _POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        (400,),
    ),
    "chunks of HTTP/1.0": (
        b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        (400,),
    ),
    "a chunk without a size": (_CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n", (400,)),
    "a chunk of a size that overflows": (_CHUNKED + b"f" * 17 + b"\r\n{}", (400,)),
    "a chunk that is longer than it says": (_CHUNKED + b"2\r\n{}}}\r\n0\r\n\r\n", (400,)),
    "a chunk that ends in LF": (_CHUNKED + b"2\n{}\n0\n\n", (400,)),
    "an extension without end": (_CHUNKED + b"2;" + b"a" * 1_000_000, (431,)),
    "small chunks with long extensions": (
        _CHUNKED + (b"1;" + b"a" * 1_000 + b"\r\n \r\n") * 1_000,
        (431,),
    ),
    "trailers without end": (_CHUNKED + b"2\r\n{}\r\n0\r\n" + b"X: a\r\n" * 100_000, (431,)),
    "a trailer without end": (_CHUNKED + b"2\r\n{}\r\n0\r\nX: " + b"a" * 1_000_000, (431,)),
    "lines that end in LF": (b"GET / HTTP/1.1\nHost: a\n\n", (400,)),
    "a folded header": (_GET + _HOST + b"X: a\r\n b\r\n" + _END, (400,)),
    "a space before a colon": (_GET + b"Host : a\r\n" + _END, (400,)),
    "a header without a name": (_GET + _HOST + b": a\r\n" + _END, (400,)),
    "a NUL in a header": (_GET + _HOST + b"X: a\0b\r\n" + _END, (400,)),
    "no host": (_GET + _END, (400,)),
    "two hosts": (_GET + _HOST + _HOST + _END, (400,)),
    "a host that is none": (_GET + b"Host: a/b@c\r\n" + _END, (400,)),
    "HTTP/2 without being asked": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400,)),
    "HTTP/3.7": (b"GET / HTTP/3.7\r\n" + _HOST + _END, (400,)),
    "HTTP/0.9": (b"GET /\r\n\r\n", (400, 505)),
    "a full address as target": (
        b"GET http://127.0.0.1:9090/metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        (404,),
    ),
    "an address without a path": (b"GET http://a HTTP/1.1\r\n" + _HOST + _END, (404,)),
    "an address that is none": (b"GET http://a:99999999/ HTTP/1.1\r\n" + _HOST + _END, (400,)),
    "a target that is no path": (b"GET v1/models HTTP/1.1\r\n" + _HOST + _END, (400,)),
    "a star": (b"OPTIONS * HTTP/1.1\r\n" + _HOST + _END, (404,)),
    "a path that climbs": (
        b"GET /v1/../metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        (404,),
    ),
    "a tunnel": (b"CONNECT 127.0.0.1:22 HTTP/1.1\r\n" + _HOST + _END, (405,)),
    "a method that nobody knows": (b"STEAL / HTTP/1.1\r\n" + _HOST + _END, (400,)),
}


def _add_raw(name: str, data: bytes, statuses: tuple[int, ...]) -> None:
    @case(name, *statuses)
    async def _(scene: Scene) -> httpx.Response:
        return await scene.raw(data, patience=5)


for _name, (_raw, _statuses) in RAW.items():
    _add_raw(_name, _raw, _statuses)
