"""What a medium is, and what finding out may cost."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media.probe import processes
from ep_serve.gateway.media.probe.processes import MediaProber
from ep_serve.gateway.metrics import Metrics
from ep_serve.gateway.settings import ProbeSettings
from tests.clips import make_clip, make_image, make_sound, make_wav
from tests.gateway.bombs import flac_bomb, opus_bomb, png_bomb

pytestmark = pytest.mark.anyio

Probe = Callable[[bytes], Coroutine[Any, Any, dict[str, Any]]]


@asynccontextmanager
async def probing(folder: Path, **settings: Any) -> AsyncIterator[tuple[Probe, MediaProber]]:
    prober = MediaProber(ProbeSettings(**settings), Metrics())

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
        for fmt in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "AVIF"):
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
        (make_image(fmt="TIFF"), 415),
        (make_wav(1)[:-1000], 422),
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


@pytest.mark.parametrize(
    ("bomb", "words"),
    [
        (lambda: opus_bomb(400_000), "1800 s"),
        (lambda: png_bomb(30_000, 30_000), "pixels|format"),
        (lambda: png_bomb(65_000, 65_000), "pixels|format"),
        (lambda: flac_bomb(8), "5 s"),
    ],
)
async def test_a_decompression_bomb_is_refused(tmp_path: Path, bomb: Any, words: str) -> None:
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
        assert prober._helper is not None
        os.kill(prober._helper.pid, signal.SIGKILL)
        await asyncio.sleep(0.2)
        assert (await probe(make_wav(0.1)))["audio"]


async def test_a_medium_that_ends_the_helper_is_the_only_one_that_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MODULE", "tests.gateway.poisoned_helper")
    async with probing(tmp_path, concurrency=6) as (_, prober):
        paths = [tmp_path / f"medium {number}" for number in range(6)]
        for number, path in enumerate(paths):
            path.write_bytes(b"poison" if number == 2 else make_wav(0.1 + number / 10))
        results = await asyncio.gather(
            *(prober.probe(path) for path in paths), return_exceptions=True
        )
        refused = results.pop(2)
        assert isinstance(refused, ApiError)
        assert (refused.status, refused.code) == (422, "media_refused")
        assert all(isinstance(result, dict) for result in results), results


async def test_a_helper_that_does_not_answer_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "MODULE", "tests.gateway.poisoned_helper")
    monkeypatch.setattr(processes, "_GRACE_S", 2.0)
    async with probing(tmp_path, concurrency=2, timeout_s=3) as (_, prober):
        good, bad = tmp_path / "good", tmp_path / "bad"
        good.write_bytes(make_wav(0.1))
        bad.write_bytes(b"silence")
        stuck = asyncio.create_task(prober.probe(bad))
        await asyncio.sleep(0.5)
        assert (await prober.probe(good))["audio"]
        with pytest.raises(ApiError) as error:
            await stuck
        assert error.value.status == 422


async def test_where_no_process_can_be_started_media_are_refused_for_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_process(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", no_process)
    async with probing(tmp_path) as (ask, _):
        with pytest.raises(ApiError) as error:
            await ask(make_wav(0.1))
        assert (error.value.status, error.value.code) == (503, "overloaded")
        assert error.value.retry_after


async def test_a_cancelled_probe_keeps_its_slot_until_it_ends(tmp_path: Path) -> None:
    async with probing(tmp_path, concurrency=1) as (ask, prober):
        await ask(make_wav(0.1))
        assert prober._helper is not None
        os.kill(prober._helper.pid, signal.SIGSTOP)
        gone = asyncio.create_task(ask(make_wav(0.2)))
        await asyncio.sleep(0.1)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        waiting = asyncio.create_task(ask(make_wav(0.3)))
        await asyncio.sleep(0.1)
        assert len(prober._helper._answers) == 1
        os.kill(prober._helper.pid, signal.SIGCONT)
        assert (await waiting)["audio"]


async def test_the_helper_sees_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EP_SERVE_GATEWAY_UPSTREAM_API_KEY", "hush")
    async with probing(tmp_path) as (probe, prober):
        await probe(make_wav(0.1))
        assert prober._helper is not None
        environment = Path(f"/proc/{prober._helper.pid}/environ").read_bytes()
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
