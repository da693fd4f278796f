"""The memory of a gateway under clients that send as much as they can."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ep_serve.gateway.settings import RequestSettings
from tests.clips import make_image
from tests.gateway.bombs import avi_bomb, gif_bomb, opus_bomb, png_bomb
from tests.gateway.conftest import bearer, gateway_process, write_keys
from tests.gateway.mock_upstream import MODEL, MockUpstream
from tests.gateway.test_api import check_error
from tests.gateway.test_media import data_url, part

pytestmark = pytest.mark.anyio

MIB = 1 << 20
SETTINGS = {
    "request": {"max_body_bytes": 16 * MIB, "max_buffered_bytes": 64 * MIB, "body_timeout_s": 2},
    "media": {"max_bytes": 32 * MIB},
    "store": {"quota_bytes": 128 * MIB},
}
BESIDE_BODIES = 200 * MIB
"""What the sizing page adds to `request.max_buffered_bytes`."""
BOUND = RequestSettings().max_buffered_bytes + BESIDE_BODIES
LONGEST_STALL_S = 3
"""A second on an idle machine; the parser alone took ten for lists of lists."""


def peak(pid: int) -> int:
    """The most memory a process ever had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


async def endless(start: bytes, limit: int) -> AsyncIterator[bytes]:
    yield start
    for _ in range(limit // MIB):
        yield b"x" * MIB


BOMB = 25_000_000
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "sound for eleven days": (lambda: opus_bomb(BOMB, honest=True), "1800 s"),
    "sound that says it takes no time": (lambda: opus_bomb(BOMB), "1800 s"),
    "a picture with too many pixels": (lambda: png_bomb(60_000, 60_000, BOMB), "35389440 pixels"),
    "a picture that moves for hours": (lambda: gif_bomb(BOMB), "1800 s"),
    "a video of a million pictures": (lambda: avi_bomb(BOMB, 10_000), "216000"),
    "a video for a month": (lambda: avi_bomb(BOMB, 1), "1800 s"),
}
"""Each with what names the limit in the refusal."""


async def test_bombs_of_25_mb_are_refused_with_the_limit_and_cost_no_memory(
    tmp_path: Path,
) -> None:
    patient = {"media": {"probe": {"timeout_s": 100, "cpu_s": 100}}}  # this machine may be busy
    async with (
        MockUpstream() as engine,
        gateway_process(tmp_path, engine, **patient) as (process, port),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):

        async def upload(name: str) -> None:
            make, words = BOMBS[name]
            answer = await client.post("/v1/files", files={"file": ("a", make())})
            error = check_error(answer, 422, "media_refused")
            assert words in error["message"], (name, error)

        async def inline(name: str) -> None:
            make, words = BOMBS[name]
            message = {"role": "user", "content": part("audio_url", data_url(make()))}
            given = {"model": MODEL, "messages": [message]}
            error = check_error(await client.post("/v1/chat/completions", json=given), 422)
            assert words in error["message"], (name, error)

        await asyncio.gather(*(upload(name) for name in BOMBS))
        await inline("sound for eleven days")
        assert not engine.requests
        print(f"peak {peak(process.pid) / MIB:.0f} MiB")
        assert peak(process.pid) < BOUND
        assert not [f for f in (tmp_path / "store" / "blobs").rglob("*") if f.is_file()]


async def test_memory_stays_bounded_under_abuse(tmp_path: Path) -> None:
    async with (
        MockUpstream() as engine,
        gateway_process(tmp_path, engine, **SETTINGS) as (process, port),
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            timeout=30,
            limits=httpx.Limits(max_connections=None),
        ) as client,
    ):
        json_type = {"content-type": "application/json"}
        form_type = {"content-type": "multipart/form-data; boundary=x"}
        head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'

        async def body() -> int:
            content = endless(b'{"a":"', 15 * MIB)
            answer = await client.post("/v1/chat/completions", content=content, headers=json_type)
            return answer.status_code

        async def upload() -> int:
            content = endless(head, 64 * MIB)
            answer = await client.post("/v1/files", content=content, headers=form_type)
            return answer.status_code

        async def medium(data: bytes) -> int:
            content = part("audio_url", data_url(data))
            message = {"role": "user", "content": content}
            given = {"model": MODEL, "messages": [message]}
            return (await client.post("/v1/chat/completions", json=given)).status_code

        bomb = opus_bomb(11 * MIB)
        codes = await asyncio.gather(
            *(body() for _ in range(12)),
            *(upload() for _ in range(6)),
            *(medium(bomb) for _ in range(3)),
        )
        assert set(codes) <= {400, 413, 415, 422, 429, 503}
        assert (await medium(make_image())) == 415  # it still thinks
        print(f"peak {peak(process.pid) / MIB:.0f} MiB")
        assert peak(process.pid) < 64 * MIB + BESIDE_BODIES
        stored = sum(f.stat().st_size for f in (tmp_path / "store").rglob("*") if f.is_file())
        assert stored <= 130 * MIB


def padded(value: bytes) -> bytes:
    """A chat request with a field that the gateway does not know."""
    message = {"role": "user", "content": "x"}
    head = json.dumps({"model": MODEL, "messages": [message]}).encode()
    return head[:-1] + b', "x": ' + value + b"}"


def medium_of(base64: str) -> bytes:
    content = part("audio_url", f"data:;base64,{base64}")
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": content}]}).encode()


def calls_of(arguments: str, number: int) -> bytes:
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "1", "type": "function", "function": function}]
    messages = [{"role": "assistant", "tool_calls": calls}] * number
    return json.dumps({"model": MODEL, "messages": messages}).encode()


MOST_TEXT = RequestSettings().max_text_bytes - 1_000
BODIES: dict[str, tuple[Callable[[], bytes], set[int]]] = {
    "47 MiB of empty lists": (lambda: padded(b"[" + b"[]," * (47 * MIB // 3) + b"[]]"), {400}),
    "47 MiB of empty texts": (lambda: padded(b"[" + b'"",' * (47 * MIB // 3) + b'""]'), {400}),
    "47 MiB of a text": (lambda: padded(b'"' + b"x" * 47 * MIB + b'"'), {413}),
    "47 MiB of a medium": (
        lambda: medium_of("A" * 47 * MIB),
        {415, 422, 429},
    ),
    "as many objects as a body may have": (
        lambda: padded(b"[" + b",".join(b'{"k%d":1}' % n for n in range(45_000)) + b"]"),
        {200, 429},
    ),
    "as much wide text as a body may have": (
        lambda: padded(b'"' + b"x" * MOST_TEXT + "\N{CLAPPING HANDS SIGN}".encode() + b'"'),
        {200, 429},
    ),
    "as many escapes as a body may have": (
        lambda: padded(b'"' + b"\\u0001" * (MOST_TEXT // 6) + b'"'),
        {200, 429},
    ),
    "a thousand messages with many arguments": (
        lambda: calls_of("[" + "1," * 90 + "1]", 1_000),
        {200, 429},
    ),
}
"""The bodies that cost most, and what they are answered."""


@contextmanager
def heartbeat(port: int) -> Iterator[list[float]]:
    """Ask for `/health` again and again; how long each answer took."""
    took: list[float] = []
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.02):
            since = time.perf_counter()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/health")
            assert connection.getresponse().read()
            connection.close()
            took.append(time.perf_counter() - since)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join()


async def test_the_worst_bodies_take_the_memory_that_settings_promise(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", [{"name": f"t{number}"} for number in range(4)])
    patient = {
        "routing": {"health_timeout_s": 60},
        "media": {"probe": {"timeout_s": 60}},
    }
    async with (
        MockUpstream() as engine,
        gateway_process(tmp_path, engine, keys_file=str(keys), **patient) as (process, port),
        httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            timeout=120,
            limits=httpx.Limits(max_connections=None),
        ) as client,
    ):

        async def send(body: bytes, number: int) -> int | None:
            headers = {"content-type": "application/json", **bearer(f"t{number % 4}")}
            try:
                answer = await client.post("/v1/chat/completions", content=body, headers=headers)
            except httpx.TransportError:  # refused while the client still sent
                return None
            return answer.status_code

        for name, (make, statuses) in BODIES.items():
            body = make()
            with heartbeat(port) as took:
                codes = await asyncio.gather(*(send(body, number) for number in range(8)))
            reached = peak(process.pid)
            print(f"{name}: peak {reached / MIB:.0f} MiB, longest {max(took):.2f} s, {codes}")
            assert set(codes) <= {None, *statuses}, name
            assert reached < BOUND, name
            assert max(took) < LONGEST_STALL_S, name

        # The room is full of requests that an engine has not answered.
        engine.mode = "hang"
        room = RequestSettings().max_buffered_bytes
        bodies = [padded(b'"%d' % n + b"x" * MOST_TEXT + b'"') for n in range(2)]
        sent = [
            asyncio.create_task(send(bodies[number % 2], number))
            for number in range(room // MOST_TEXT + 8)
        ]
        done, running = await asyncio.wait(sent, timeout=60, return_when=asyncio.FIRST_COMPLETED)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert {task.result() for task in done} == {429}
        print(f"full: peak {peak(process.pid) / MIB:.0f} MiB")
        assert peak(process.pid) < BOUND
