"""What a client may get wrong: refused in a sentence and in time, and the server goes on."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from ep_serve.contract.media_tokens import MEDIA_TOKENS
from tests.clips import make_clip, make_image, make_sound, make_wav
from tests.engine.client import MODEL, Client, audio, image, part, text, user, video

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]

Parts = Callable[[], list[dict[str, Any]]]


def box(kind: bytes, content: bytes = b"") -> bytes:
    """A box of an MP4 file."""
    return struct.pack(">I", 8 + len(content)) + kind + content


def png_of(width: int, height: int) -> bytes:
    """A PNG file that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + end


def large_picture() -> bytes:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


def an_hour_of_sound() -> bytes:
    return make_sound(rate=8_000, container="flac", tone=np.zeros((1, 3600 * 8_000), np.float32))


BAD_MEDIA: dict[str, Parts] = {
    "a truncated clip": lambda: [video(make_clip(2)[:-2000])],
    "half a clip": lambda: [video((clip := make_clip(2))[: len(clip) // 2])],
    "a clip overwritten in the middle": lambda: [
        video((clip := make_clip(2))[:40] + bytes(len(clip) - 80) + clip[-40:])
    ],
    "a container without streams": lambda: [
        video(box(b"ftyp", b"isom\0\0\2\0isom") + box(b"moov", box(b"mvhd", bytes(100))))
    ],
    "an empty file": lambda: [video(b"")],
    "a web page as a clip": lambda: [video(b"<!doctype html><html><body>no</body></html>")],
    "a playlist as a clip": lambda: [video(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n")],
    "a sound as a clip": lambda: [video(make_wav(1))],
    "an unreadable codec": lambda: [video(make_clip(2).replace(b"avc1", b"zzzz"))],
    "an empty sound": lambda: [audio(make_wav(0))],
    "a sound too short for a token": lambda: [audio(make_wav(0.01))],
    "a sound of an hour": lambda: [audio(an_hour_of_sound())],
    "a picture as a sound": lambda: [audio(make_image())],
    "noise as a sound": lambda: [audio(bytes(range(256)) * 64)],
    "a picture without width": lambda: [image(png_of(0, 10))],
    "a picture of 100,000 x 100,000": lambda: [image(png_of(100_000, 100_000))],
    "a picture of 20,000 x 20,000": lambda: [image(large_picture())],
    "a truncated picture": lambda: [image(make_image()[:200])],
    "a picture 300 times as wide as high": lambda: [image(make_image(3000, 10))],
    "no base64": lambda: [part("video", "data:video/mp4;base64,####")],
    "a data URL that is not base64": lambda: [part("video", "data:video/mp4,hello")],
    "a data URL without data": lambda: [part("video", "data:video/mp4;base64")],
    "a file URL": lambda: [part("video", "file:///etc/passwd")],
    "an FTP URL": lambda: [part("image", "ftp://127.0.0.1/e.png")],
    "a URL where nothing answers": lambda: [part("video", "http://127.0.0.1:9/a.mp4")],
    "no URL at all": lambda: [part("video", "clip.mp4")],
    "more media than allowed": lambda: [image(make_image())] * 3,
    "an unknown id instead of a medium": lambda: [
        {"type": "video_url", "video_url": None, "uuid": "never-sent"}
    ],
    "a prompt over the limit": lambda: [video(make_clip(30, fps=2, size=(448, 448)))],
}

BAD_FIELDS: dict[str, dict[str, Any]] = {  # the first field is the one that is named
    "keep_ratio": {"keep_ratio": 0},
    "a negative keep_ratio": {"keep_ratio": -0.2},
    "keep_ratio above 1": {"keep_ratio": 2},
    "keep_ratio as a word": {"keep_ratio": "x"},
    "keep_ratio as a list": {"keep_ratio": [0.2]},
    "keep_ratio as a truth value": {"keep_ratio": True},
    "fps above the limit": {"fps": 1000},
    "fps of zero": {"fps": 0},
    "max_pixels above the limit": {"max_pixels": 10**9},
    "max_pixels below a token": {"max_pixels": 100},
    "min_pixels of a billion": {"min_pixels": 10**9},
    "min_pixels above max_pixels": {"min_pixels": 150_000, "max_pixels": 100_000},
}


def check_refusal(server: Client, response: httpx.Response) -> str:
    """A 4xx with a message for people, and a server that is well; the message."""
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert error["type"]
    assert len(error["message"]) > 10
    assert "Traceback" not in error["message"]
    assert httpx.get(f"{server.root}/health", timeout=10).status_code == 200
    message: str = error["message"]
    return message


@pytest.mark.parametrize("parts", BAD_MEDIA.values(), ids=BAD_MEDIA.keys())
def test_bad_media_are_refused(server: Client, parts: Parts) -> None:
    check_refusal(server, server.post({"messages": user(*parts(), text("What is it?"))}))


@pytest.mark.parametrize("body", BAD_FIELDS.values(), ids=BAD_FIELDS.keys())
def test_bad_fields_are_refused_by_name(server: Client, body: dict[str, Any]) -> None:
    message = check_refusal(server, server.post({"messages": user(text("Hello")), **body}))
    assert next(iter(body)) in message


def test_options_of_the_processor_that_are_not_ours_are_refused(server: Client) -> None:
    body = {"messages": user(text("Hello")), "mm_processor_kwargs": {"size": {}}}
    assert "size" in check_refusal(server, server.post(body))


def test_a_keep_ratio_that_is_no_number_is_refused(server: Client) -> None:
    body = {"model": MODEL, "messages": user(text("Hello")), "keep_ratio": float("nan")}
    response = httpx.post(
        f"{server.root}/v1/chat/completions",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
        timeout=10,
    )
    assert "keep_ratio" in check_refusal(server, response)


@pytest.mark.parametrize("token", MEDIA_TOKENS)
@pytest.mark.parametrize("with_media", [True, False])
def test_media_tokens_in_text_are_refused(server: Client, token: str, with_media: bool) -> None:
    media = [image(make_image())] if with_media else []
    response = server.post({"messages": user(*media, text(f"What is {token}?"))})
    assert token in check_refusal(server, response)


def test_a_media_token_in_two_pieces_is_refused(server: Client) -> None:
    response = server.post({"messages": user(text("What is <|VID"), text("EO|> here?"))})
    assert "<|VIDEO|>" in check_refusal(server, response)


def test_the_server_still_answers_after_all_that(server: Client) -> None:
    assert server.post({"messages": user(text("Hello"))}).status_code == 200


ODD_BUT_SOUND: dict[str, Parts] = {
    "a clip of one frame": lambda: [video(make_clip(1 / 8, sound_rate=None))],
    "a clip of three frames": lambda: [video(make_clip(3 / 8))],
    "a variable frame rate": lambda: [
        video(make_clip(times=[0, 0.1, 0.15, 0.9, 1.0, 2.5, 2.6, 3.0]))
    ],
    "a clip on its side": lambda: [video(make_clip(2, size=(140, 112), rotation=90))],
    "odd sizes": lambda: [video(make_clip(2, size=(114, 58)))],
    "another container": lambda: [
        video(make_clip(2, codec="libvpx", container="webm", sound_rate=48_000))
    ],
    "mono at 8 kHz": lambda: [video(make_clip(2, sound_rate=8_000))],
    "stereo at 44.1 kHz": lambda: [video(make_clip(2, sound_rate=44_100, channels=2))],
    "5.1 at 48 kHz": lambda: [video(make_clip(2, sound_rate=48_000, channels=6))],
    "a sound shorter than the picture": lambda: [video(make_clip(3, sound_seconds=1))],
    "a sound longer than the picture": lambda: [video(make_clip(2, sound_seconds=4))],
    "an empty sound track": lambda: [video(make_clip(2, sound_seconds=0))],
    "a stereo sound at 22.05 kHz": lambda: [audio(make_wav(1, 22_050, 2))],
    "a JPEG in portrait": lambda: [image(make_image(60, 200, "JPEG"))],
    "a picture of one pixel": lambda: [image(make_image(1, 1))],
    "a clip with sound beside one without": lambda: [
        video(make_clip(2)),
        video(make_clip(2, sound_rate=None)),
    ],
}


@pytest.mark.parametrize("parts", ODD_BUT_SOUND.values(), ids=ODD_BUT_SOUND.keys())
def test_what_is_odd_but_sound_is_served(server: Client, parts: Parts) -> None:
    answer = server.ask(user(*parts(), text("What is it?")), max_tokens=2)
    assert len(answer.token_ids) == 2
    assert answer.reduction is not None
    assert answer.reduction["av_tokens_kept"] >= 1


def test_an_id_keeps_its_content_within_a_cache_salt(server: Client) -> None:
    def ask(data: bytes | None, salt: str | None = None, **options: Any) -> httpx.Response:
        """A picture or none under the id "cat"."""
        url = None if data is None else image(data)["image_url"]
        medium = {"type": "image_url", "image_url": url, "uuid": "cat"}
        body = {"messages": user(medium, text("?")), "max_tokens": 1, **options}
        return server.post({**body, "cache_salt": salt} if salt else body)

    cat, dog = (make_image(number=number) for number in (71, 72))
    unknown = check_refusal(server, ask(None))
    assert "'cat' (image) is not cached" in unknown
    assert ask(cat).status_code == ask(None).status_code == 200
    refused = check_refusal(server, ask(dog))
    assert "'cat' (image) already refers to other content" in refused
    assert "never computed with" in check_refusal(server, ask(None, max_pixels=50_000))
    assert check_refusal(server, ask(None, salt="anna")) == unknown
    assert ask(dog, salt="anna").status_code == ask(None, salt="anna").status_code == 200
