"""Whatever bytes arrive, the answer is an array or a `MediaError`, and it comes soon."""

from __future__ import annotations

import io
import re
import socket
import struct
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ep_serve.media import (
    MediaError,
    MediaLimits,
    SamplingRule,
    decode_clip,
    decode_image,
    decode_sound,
)
from tests.clips import make_clip, make_image, make_png_header, make_sound, make_wav

LIMITS = MediaLimits()
RULE = SamplingRule()
SECONDS = 10

FASTSTART = {"movflags": "faststart"}


def _video(data: bytes) -> object:
    return decode_clip(data, RULE, LIMITS)


def _sound(data: bytes) -> object:
    return decode_sound(data, LIMITS)


def _image(data: bytes) -> object:
    return decode_image(data, LIMITS)


@cache
def _clip(container: str = "mp4", faststart: bool = False, codec: str = "libx264") -> bytes:
    return make_clip(
        container=container, codec=codec, options=FASTSTART if faststart else {}, pix_fmt=None
    )


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _patched(data: bytes, old: bytes, new: bytes) -> bytes:
    """`data` with the first `old` overwritten by `new`, which begins at the same place."""
    at = data.index(old)
    return data[:at] + new + data[at + len(new) :]


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("clip.mp4", _clip())
    return file.getvalue()


def _avi_of(width: int, height: int) -> bytes:
    """An AVI of raw video whose headers, not its data, state this size."""
    data = make_clip(1, codec="rawvideo", container="avi", sound_rate=None, pix_fmt="yuv420p")
    at = data.index(b"strf") + 12
    return data[:at] + struct.pack("<ii", width, height) + data[at + 8 :]


def _slow_mp4() -> bytes:
    """An MP4 of 4 s whose clock ticks once a second instead of 16,384 times."""
    data = bytearray(_clip())
    struct.pack_into(">I", data, data.index(b"mdhd") + 16, 1)
    return bytes(data)


def _moov_without_tracks() -> bytes:
    """An MP4 with a movie header and nothing else."""
    data = _clip()
    at = data.index(b"mvhd") - 4
    header = data[at : at + struct.unpack(">I", data[at : at + 4])[0]]
    return data[:32] + struct.pack(">I", 8 + len(header)) + b"moov" + header


HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile '/etc/passwd'\n"
DASH = (
    b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
    b'<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
    b"<BaseURL>file:///etc/passwd</BaseURL></Representation></AdaptationSet></Period></MPD>"
)
SDP = b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
SUBTITLES = b"1\n00:00:00,000 --> 00:00:01,000\nhello\n"
NOISE = np.random.default_rng(0).bytes(100_000)

Case = tuple[Callable[[bytes], object], Callable[[], bytes], str]
HOSTILE: dict[str, Case] = {
    "an empty video": (_video, lambda: b"", "the video is empty (0 bytes)"),
    "an empty sound": (_sound, lambda: b"", "the sound is empty (0 bytes)"),
    "an empty image": (_image, lambda: b"", "the image is empty (0 bytes)"),
    "html as a video": (_video, lambda: HTML, "not in a container that is served"),
    "html as a sound": (_sound, lambda: HTML, "not in a container that is served"),
    "html as an image": (_image, lambda: HTML, "in none of the formats served"),
    "text as a video": (_video, lambda: b"hello\n" * 999, "not in a container that is served"),
    "zeros as a video": (_video, lambda: bytes(100_000), "not in a container that is served"),
    "noise as a video": (_video, lambda: NOISE, ""),
    "noise as a sound": (_sound, lambda: NOISE, ""),
    "noise as an image": (_image, lambda: NOISE, "in none of the formats served"),
    "a zip archive": (_video, _zip, "not in a container that is served"),
    "subtitles": (_video, lambda: SUBTITLES, "not in a container that is served"),
    "a playlist": (_video, lambda: PLAYLIST, "not in a container that is served"),
    "a concat script": (_video, lambda: CONCAT, "not in a container that is served"),
    "a concat script as a sound": (_sound, lambda: CONCAT, "not in a container that is served"),
    "a dash manifest": (_video, lambda: DASH, "not in a container that is served"),
    "a session description": (_video, lambda: SDP, "not in a container that is served"),
    "an image as a video": (_video, make_image, "not in a container that is served"),
    "an image as a sound": (_sound, make_image, "not in a container that is served"),
    "a video as an image": (_image, _clip, "in none of the formats served"),
    "a postscript image": (_image, lambda: make_image(fmt="EPS"), "in none of the formats"),
    "a wav as a video": (_video, make_wav, "the file has no video stream"),
    "an mp4 of sound as a video": (
        _video,
        lambda: make_sound(container="mp4", codec="aac"),
        "the file has no video stream",
    ),
    "a silent video as a sound": (
        _sound,
        lambda: make_clip(sound_rate=None),
        "the file has no sound track",
    ),
    "an mp4 without tracks": (_video, _moov_without_tracks, ""),
    "an mp4 whose header is cut off": (_video, lambda: _half(_clip()), "cut short"),
    "an mp4 whose data are cut off": (
        _video,
        lambda: _half(_clip(faststart=True)),
        "the video is cut short: its index lists 32 packets, the file holds",
    ),
    "a matroska that is cut off": (
        _video,
        lambda: _half(_clip("matroska")),
        "the video is cut short: its header states 4.1 s, the file holds 2.0 s",
    ),
    "the first kilobyte of an mp4": (_video, lambda: _clip()[:1000], "cut short"),
    "an mp4 whose data are zeros": (
        _video,
        lambda: _patched(_clip(faststart=True), b"mdat", b"mdat" + bytes(60_000))[:36_000],
        "",
    ),
    "a codec that is not served": (
        _video,
        lambda: make_clip(codec="qtrle", container="mov", sound_rate=None),
        "the video uses the codec qtrle, which is not served",
    ),
    "a codec nobody knows": (
        _video,
        lambda: _patched(_clip(), b"avc1\0", b"zzzz\0"),
        "codec",
    ),
    "a sound track whose codec is not served": (
        _video,
        lambda: make_clip(container="flv", sound_codec="nellymoser", sound_rate=44_100),
        "the sound uses the codec nellymoser, which is not served",
    ),
    "a video of one huge frame": (_video, lambda: _avi_of(20_000, 20_000), "pixels"),
    "a video of frames without a size": (_video, lambda: _avi_of(0, 0), ""),
    "a video of frames of negative size": (_video, lambda: _avi_of(-5, 7), ""),
    "a video of more than half an hour": (_video, _slow_mp4, "s; the limit is 1800 s"),
    "an hour of sound": (
        _sound,
        lambda: make_sound(rate=4_000, tone=np.zeros((1, 3600 * 4_000), np.float32)),
        "the sound lasts 3600.0 s; the limit is 1800 s",
    ),
    "an image of 400 million pixels": (
        _image,
        lambda: make_png_header(20_000, 20_000),
        "pixels; the limit is 35389440 pixels",
    ),
    "an image over the limit": (
        _image,
        lambda: make_png_header(9_000, 9_000),
        "the image has 9000x9000 = 81000000 pixels; the limit is 35389440 pixels",
    ),
    "an image without pixels": (_image, lambda: make_png_header(0, 10), ""),
    "a png that is cut off": (_image, lambda: _half(make_image()), "cut short or damaged"),
    "a jpeg that is cut off": (
        _image,
        lambda: _half(make_image(fmt="JPEG")),
        "cut short or damaged",
    ),
    "a webp that is cut off": (_image, lambda: _half(make_image(fmt="WEBP")), ""),
}


@pytest.mark.parametrize(("decode", "make", "sentence"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_bad_file_is_refused_with_a_sentence_and_soon(
    decode: Callable[[bytes], object], make: Callable[[], bytes], sentence: str
) -> None:
    data = make()
    begin = time.monotonic()
    with pytest.raises(MediaError) as caught:
        decode(data)
    assert time.monotonic() - begin < SECONDS
    message = str(caught.value)
    assert sentence in message
    assert not re.search(r"/\w+/|Errno|Traceback|0x[0-9a-f]{6}|<none>", message)


@pytest.mark.parametrize("decode", [_video, _sound], ids=["video", "sound"])
def test_a_script_of_other_files_opens_none_of_them(
    tmp_path: Path, decode: Callable[[bytes], object]
) -> None:
    good = tmp_path / "good.mp4"
    good.write_bytes(_clip())
    script = f"ffconcat version 1.0\nfile '{good}'\n".encode()
    with av.open(io.BytesIO(script), options={"safe": "0"}) as unguarded:
        assert unguarded.streams.video, "the script must work where nothing forbids it"
    with pytest.raises(MediaError, match="not in a container that is served"):
        decode(script)


@pytest.mark.parametrize("kind", ["m3u8", "dash", "concat", "sdp"])
def test_a_playlist_of_addresses_reaches_none_of_them(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/clip.mp4".encode()
        playlist = {
            "m3u8": PLAYLIST.replace(b"file:///etc/passwd", url),
            "dash": DASH.replace(b"file:///etc/passwd", url),
            "concat": CONCAT.replace(b"/etc/passwd", url),
            "sdp": SDP,
        }[kind]
        with pytest.raises(MediaError):
            _video(playlist)
        with pytest.raises(TimeoutError):
            server.accept()


def _survives(decode: Callable[[bytes], Any], data: bytes) -> None:
    begin = time.monotonic()
    with suppress(MediaError):
        decode(data)
    assert time.monotonic() - begin < SECONDS


GOOD: list[tuple[Callable[[bytes], object], Callable[[], bytes]]] = [
    (_video, _clip),
    (_video, lambda: _clip(faststart=True)),
    (_video, lambda: _clip("matroska")),
    (_video, lambda: _clip("mpegts")),
    (_video, lambda: _clip("avi", codec="mpeg4")),
    (_sound, cache(make_wav)),
    (_sound, cache(lambda: make_sound(container="ogg", rate=48_000))),
    (_sound, cache(lambda: make_sound(container="flac"))),
    (_image, cache(make_image)),
    (_image, cache(lambda: make_image(fmt="JPEG"))),
    (_image, cache(lambda: make_image(fmt="WEBP"))),
]
QUICKLY = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@QUICKLY
@given(st.sampled_from(GOOD), st.floats(0, 1))
def test_a_file_cut_anywhere_is_served_or_refused(
    good: tuple[Callable[[bytes], object], Callable[[], bytes]], share: float
) -> None:
    decode, make = good
    _survives(decode, make()[: int(share * len(make()))])


@QUICKLY
@given(
    st.sampled_from(GOOD),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 7)), max_size=40),
    st.booleans(),
)
def test_a_file_with_flipped_bits_is_served_or_refused(
    good: tuple[Callable[[bytes], object], Callable[[], bytes]],
    flips: list[tuple[float, int]],
    in_the_header: bool,
) -> None:
    decode, make = good
    data = bytearray(make())
    span = min(len(data), 3000) if in_the_header else len(data)
    for place, bit in flips:
        data[int(place * span)] ^= 1 << bit
    _survives(decode, bytes(data))
