"""The memory of a server's API process under files and bodies that want as much as they can."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from PIL import Image

from ep_serve.contract.request_options import FRAME_PIXELS, MAX_PIXELS
from ep_serve.engine.input.medium import Modality
from tests import memory
from tests.clips import make_clip, make_image, make_sound, make_wav
from tests.contract.media_files import many_channels
from tests.engine.client import MODEL, Client, data_url, part, text, user
from tests.engine.conftest import MEMORY_GIB
from tests.gateway.bombs import avi_bomb, flac_bomb, gif_bomb, opus_bomb, png_bomb
from tests.media.test_hostile import GOOD, HOSTILE

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]

AT_ONCE = 8
MIB = 1 << 20
BESIDE = 384 * MIB
"""What decoders, threads and glibc's arenas take besides what the settings count."""


def picture(fmt: str, mode: str = "RGB", **save: Any) -> bytes:
    """A picture of the most pixels that are decoded."""
    file = io.BytesIO()
    Image.new(mode, (8192, 4320)).save(file, fmt, **save)
    return file.getvalue()


def silence(seconds: int) -> bytes:
    """A sound of few bytes."""
    return make_sound(rate=8_000, container="flac", tone=np.zeros((1, seconds * 8_000), np.float32))


BOMBS: dict[str, tuple[Modality, Callable[[], bytes], dict[str, Any]]] = {
    "a GIF of 35 million pixels and 45,000 frames": ("video", lambda: gif_bomb(MIB), {}),
    "an AVI of 35 million pixels": ("video", lambda: avi_bomb(100_000, 30), {}),
    "a day of Opus in 400 kB": ("audio", lambda: opus_bomb(400_000), {}),
    "nine minutes of Opus in 10 kB": ("audio", lambda: opus_bomb(10_000), {}),
    "four minutes of sound": ("audio", lambda: silence(235), {}),
    "thirty minutes of sound": ("audio", lambda: silence(1_790), {}),
    "FLAC of 8 channels at 192 kHz": ("audio", lambda: flac_bomb(20), {}),
    "WAV of 64 channels": ("audio", lambda: many_channels(64), {}),
    "WAV at 384 kHz": ("audio", lambda: make_sound(20, 384_000, 8), {}),
    "a PNG without its pixels": ("image", lambda: png_bomb(8_192, 4_320), {}),
    "a JPEG of 35 million pixels": ("image", lambda: picture("JPEG"), {}),
    "a WebP of 35 million pixels": ("image", lambda: picture("WEBP", method=0), {}),
    "a PNG with transparency": ("image", lambda: picture("PNG", "RGBA"), {}),
    "a PNG of 16 bits": ("image", lambda: picture("PNG", "I;16"), {}),
    "a small picture enlarged": (
        "image",
        lambda: make_image(20, 20),
        {"min_pixels": MAX_PIXELS},
    ),
    "many small frames enlarged": (
        "video",
        lambda: make_clip(100, fps=2, size=(64, 64), sound_rate=None),
        {"min_pixels": FRAME_PIXELS},
    ),
    "many frames": ("video", lambda: make_clip(40, fps=2, size=(448, 448), sound_rate=None), {}),
}


def files() -> Iterator[tuple[Modality, bytes, dict[str, Any]]]:
    """The files above and those of the hostile suite of `tests/media`."""
    for modality, make, options in BOMBS.values():
        yield modality, make(), options
    named: dict[str, Modality] = {"_video": "video", "_sound": "audio", "_image": "image"}
    assert set(named.values()) == set(get_args(Modality))
    for decode, make in [*((case[0], case[1]) for case in HOSTILE.values()), *GOOD]:
        yield named[decode.__name__], make(), {}


def bodies() -> Iterator[bytes | Iterator[bytes]]:
    """Requests that are large themselves, whole and in chunks."""
    values = b'{"messages": [' + b"[]," * (8 * MIB) + b"[]]}"
    words = b'{"messages": "' + b"x" * (24 * MIB) + b'"}'
    for _ in range(AT_ONCE):
        yield (bytes(MIB) for _ in range(128))
        yield values
        yield words


def test_hostile_requests_take_no_more_memory_than_the_settings_allow(server: Client) -> None:
    url = f"{server.root}/v1/chat/completions"

    def send(content: Any, **options: Any) -> int:
        return httpx.post(url, content=content, timeout=300, **options).status_code

    def ask(*media: tuple[Modality, bytes], **options: Any) -> int:
        parts = [part(kind, data_url(data, "x/y")) for kind, data in media]
        body = {"model": MODEL, "messages": user(*parts, text("?")), "max_tokens": 1, **options}
        return httpx.post(url, json=body, timeout=300).status_code

    assert ask(("video", make_clip(1)), ("audio", make_wav(1)), ("image", make_image())) == 200
    pid = server.process.pid
    base = memory.resident(pid)
    memory.reset_peak(pid)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = [
            pool.submit(ask, (kind, data), (kind, data + b"\0"), **options)
            for kind, data, options in files()
        ]
        running += [pool.submit(send, body) for body in bodies()]
    statuses = Counter(one.result() for one in running)
    peak = memory.peak(pid) - base
    print(f"peak {peak / MIB:.0f} MiB above {base / MIB:.0f} MiB, answers {dict(statuses)}")
    assert set(statuses) <= {200, 400, 413, 503}
    assert {200, 400, 413} <= set(statuses)
    assert peak < sum(MEMORY_GIB.values()) * 2**30 + BESIDE
    assert httpx.get(f"{server.root}/health", timeout=10).status_code == 200
