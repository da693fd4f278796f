"""What a medium is, and what finding out may cost."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import struct
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.probe import Prober
from ep_serve.gateway.metrics import Metrics
from ep_serve.gateway.settings import ProbeSettings
from tests.clips import make_clip, make_image, make_sound, make_wav

pytestmark = pytest.mark.anyio

Probe = Callable[[bytes], Awaitable[dict[str, Any]]]


@asynccontextmanager
async def probing(folder: Path, **settings: Any) -> AsyncIterator[tuple[Probe, Prober]]:
    prober = Prober(ProbeSettings(**settings), Metrics())

    async def probe(data: bytes) -> dict[str, Any]:
        path = folder / "medium"
        path.write_bytes(data)
        return await prober.probe(path)

    try:
        yield probe, prober
    finally:
        await prober.close()


async def test_common_media_are_recognised(tmp_path: Path) -> None:
    async with probing(tmp_path) as (probe, _):
        clip = await probe(make_clip(seconds=2, fps=8))
        assert (clip["container"], clip["video"], clip["audio"]) == ("mov", "h264", "aac")
        assert (clip["width"], clip["height"], clip["frames"]) == (112, 112, 16)
        assert 1.9 < clip["duration_s"] < 2.2
        assert not clip["picture"]
        sound = await probe(make_wav(1.5))
        assert (sound["video"], sound["audio"], sound["sample_rate"]) == (None, "pcm_s16le", 16_000)
        assert 1.4 < sound["duration_s"] < 1.6
        for fmt in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"):
            assert (await probe(make_image(fmt=fmt)))["picture"], fmt
        for container in ("webm", "matroska", "avi", "flv", "mpegts"):
            codec = "libvpx" if container == "webm" else "mpeg4"
            if container == "flv":
                codec = "flv"
            made = make_clip(seconds=1, codec=codec, container=container, sound_rate=None)
            assert (await probe(made))["video"], container
        for container, codec_name in (("ogg", "libopus"), ("flac", "flac"), ("mp3", "libmp3lame")):
            made = make_sound(1, 48_000, codec=codec_name, container=container)
            assert 0.9 < (await probe(made))["duration_s"] < 1.2, container


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 415),
        (b"hello " * 1_000, 415),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", 415),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", 415),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>", 415),
        (b"%PDF-1.7\n" + b"x" * 100, 415),
        (b"<?xml version='1.0'?><MPD><BaseURL>http://127.0.0.1/</BaseURL></MPD>", 415),
        (make_clip(seconds=1)[:200], 415),
    ],
)
async def test_what_is_no_medium_is_refused(tmp_path: Path, data: bytes, status: int) -> None:
    async with probing(tmp_path) as (probe, _):
        with pytest.raises(ApiError) as error:
            await probe(data)
        assert error.value.status == status
        assert str(tmp_path) not in error.value.message


async def test_limits_are_named(tmp_path: Path) -> None:
    async with probing(
        tmp_path, max_duration_s=2, max_frames=10, max_pixels=20_000, max_aspect=5
    ) as (probe, _):
        for data, words in (
            (make_wav(3), "2 s"),
            (make_clip(seconds=1.5, fps=8, sound_rate=None), "10"),
            (make_image(200, 160), "20000 pixels"),
            (make_image(300, 20), "5 to 1"),
        ):
            with pytest.raises(ApiError, match=words) as error:
                await probe(data)
            assert error.value.status in (415, 422)


def opus_bomb(nbytes: int) -> bytes:
    """An Ogg file of Opus packets of one byte, each of which decodes to 120 ms of silence."""

    def page(kind: int, granule: int, number: int, packets: list[bytes]) -> bytes:
        table = bytes(len(packet) for packet in packets)
        head = struct.pack("<4sBBqIII", b"OggS", 0, kind, granule, 1, number, 0)
        body = head + bytes([len(table)]) + table + b"".join(packets)
        return body[:22] + struct.pack("<I", _ogg_crc(body)) + body[26:]

    pages = [
        page(2, 0, 0, [b"OpusHead" + struct.pack("<BBHIhB", 1, 1, 0, 48_000, 0, 0)]),
        page(0, 0, 1, [b"OpusTags" + struct.pack("<I", 0) + struct.pack("<I", 0)]),
    ]
    # Silk, 60 ms a frame, two frames: 120 ms in one byte and a count.
    packet = b"\x1b\x02"
    per_page = 255
    size = len(page(0, 0, 2, [packet] * per_page))
    granule = 0
    for number in range(nbytes // size):
        granule += 0  # the header lies: no time passes
        pages.append(page(0, granule, number + 2, [packet] * per_page))
    return b"".join(pages)


_CRC = [0] * 256
for _i in range(256):
    _r = _i << 24
    for _ in range(8):
        _r = (_r << 1) ^ 0x04C11DB7 if _r & 0x80000000 else _r << 1
    _CRC[_i] = _r & 0xFFFFFFFF


def _ogg_crc(data: bytes) -> int:
    value = 0
    for byte in data:
        value = ((value << 8) & 0xFFFFFFFF) ^ _CRC[(value >> 24) ^ byte]
    return value


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes and many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    row = zlib.compress(bytes(1 << 20), 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", row) + chunk(b"IEND", b"")


def flac_bomb(seconds: int) -> bytes:
    """Digital silence, which FLAC shrinks a thousandfold."""
    file = io.BytesIO()
    with av.open(file, "w", format="flac") as output:
        stream: Any = output.add_stream("flac", rate=192_000)
        stream.layout = "7.1"
        samples = np.zeros((1, 192_000 * 8), np.int16)
        for second in range(seconds):
            frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="7.1")
            frame.sample_rate, frame.pts = 192_000, second * 192_000
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(
    ("bomb", "words"),
    [
        (lambda: opus_bomb(400_000), "1800 s"),
        (lambda: png_bomb(30_000, 30_000), "pixels|format"),
        (lambda: png_bomb(65_000, 65_000), "pixels|format"),
        (lambda: flac_bomb(8), "5 s"),
    ],
)
async def test_a_bomb_does_not_go_off(tmp_path: Path, bomb: Any, words: str) -> None:
    limit = 5 if words == "5 s" else 1_800
    async with probing(tmp_path, max_duration_s=limit) as (probe, _):
        await probe(make_wav(0.1))  # the helper is there
        began = time.monotonic()
        with pytest.raises(ApiError, match=words):
            await probe(bomb())
        assert time.monotonic() - began < 8


async def test_a_medium_that_takes_too_long_is_refused_and_the_helper_lives_on(
    tmp_path: Path,
) -> None:
    async with probing(tmp_path, timeout_s=0.001) as (probe, _):
        with pytest.raises(ApiError, match="longer") as error:
            await probe(make_clip(seconds=2))
        assert error.value.status == 422
    async with probing(tmp_path, memory_bytes=1) as (probe, _):
        with pytest.raises(ApiError):
            await probe(make_clip(seconds=2))


async def test_a_helper_that_dies_is_replaced(tmp_path: Path) -> None:
    async with probing(tmp_path) as (probe, prober):
        await probe(make_wav(0.1))
        assert prober._process is not None
        os.kill(prober._process.pid, signal.SIGKILL)
        await asyncio.sleep(0.2)
        assert (await probe(make_wav(0.1)))["audio"]


async def test_the_helper_sees_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_SERVE_GATEWAY_UPSTREAM_API_KEY", "hush")
    async with probing(tmp_path) as (probe, prober):
        await probe(make_wav(0.1))
        assert prober._process is not None
        environment = Path(f"/proc/{prober._process.pid}/environ").read_bytes()
        assert b"hush" not in environment


async def test_several_media_are_probed_side_by_side(tmp_path: Path) -> None:
    async with probing(tmp_path) as (_, prober):
        paths = []
        for number in range(12):
            path = tmp_path / str(number)
            path.write_bytes(make_wav(0.1 + number / 10))
            paths.append(path)
        facts = await asyncio.gather(*(prober.probe(path) for path in paths))
        assert [round(one["duration_s"], 1) for one in facts] == [
            round(0.1 + number / 10, 1) for number in range(12)
        ]
