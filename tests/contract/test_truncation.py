"""A file that was cut short is refused on both ports, wherever its format tells its length."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest

from ep_serve.contract.truncation import missing_bytes, missing_seconds
from tests.clips import make_clip, make_sound, make_wav
from tests.contract.test_media_formats import engine_refusal, gateway_refusal

Make = Callable[[], bytes]

CUT: dict[str, tuple[str, Make]] = {
    "mp4": ("video", lambda: make_clip(4)),
    "mp4 with its header first": (
        "video",
        lambda: make_clip(4, options={"movflags": "faststart"}),
    ),
    "fragmented mp4": (
        "video",
        lambda: make_clip(4, options={"movflags": "frag_keyframe+empty_moov"}),
    ),
    "mov": ("video", lambda: make_clip(4, codec="prores", container="mov")),
    "m4a": ("audio", lambda: make_sound(4, codec="aac", container="mp4")),
    "matroska": ("video", lambda: make_clip(4, container="matroska")),
    "webm sound": ("audio", lambda: make_sound(4, 48_000, codec="libopus", container="webm")),
    "avi": ("video", lambda: make_clip(4, codec="mpeg4", container="avi", sound_codec="mp2")),
    "flv": (
        "video",
        lambda: make_clip(8, codec="flv", container="flv", sound_rate=44_100),
    ),
    "wav": ("audio", lambda: make_wav(4)),
    "wav of floats": ("audio", lambda: make_sound(4, codec="pcm_f32le")),
    "flac": ("audio", lambda: make_sound(4, container="flac")),
    "ogg": ("audio", lambda: make_sound(4, 48_000, container="ogg")),
    "mp3": ("audio", lambda: make_sound(4, 48_000, codec="libmp3lame", container="mp3")),
}


@pytest.mark.parametrize(("modality", "make"), CUT.values(), ids=CUT.keys())
def test_a_file_cut_short_is_refused(modality: str, make: Make) -> None:
    data = make()
    assert engine_refusal(data, modality) is None
    assert gateway_refusal(data, modality) is None
    for share in (0.85, 0.5):
        cut = data[: int(share * len(data))]
        assert "cut short" in (engine_refusal(cut, modality) or "")
        assert "cut short" in (gateway_refusal(cut, modality) or "")


def test_a_gif_cut_short_is_no_video() -> None:
    data = make_clip(4, codec="gif", container="gif", sound_rate=None)
    assert engine_refusal(data, "video") is None
    assert "cut short" in (engine_refusal(data[:-100], "video") or "")


class Pipe(io.RawIOBase):
    """Takes what is written and cannot go back."""

    def __init__(self) -> None:
        self.written = b""

    def write(self, data: Any, /) -> int:
        self.written += bytes(data)
        return len(data)

    def writable(self) -> bool:
        return True


def piped(container: str, codec: str) -> bytes:
    """A sound as it is written to where nothing can be changed afterwards."""
    pipe = Pipe()
    source = io.BytesIO(make_sound(2, 48_000))
    with av.open(source, "r") as given, av.open(pipe, "w", format=container) as output:
        stream: Any = output.add_stream(codec, rate=48_000)
        for frame in given.decode(audio=0):
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return pipe.written


@pytest.mark.parametrize(
    ("container", "codec"), [("wav", "pcm_s16le"), ("matroska", "libopus"), ("flac", "flac")]
)
def test_a_live_recording_that_states_no_length_is_served(container: str, codec: str) -> None:
    data = piped(container, codec)
    assert engine_refusal(data, "audio") is None
    assert gateway_refusal(data, "audio") is None


def with_data_size(size: int) -> bytes:
    data = bytearray(make_wav(1))
    struct.pack_into("<I", data, data.index(b"data") + 4, size)
    return bytes(data)


WHOLE: dict[str, tuple[str, Make]] = {
    "a wav that counts its header as data": ("audio", lambda: with_data_size(32_000 + 44)),
    "a wav of unknown length": ("audio", lambda: with_data_size(0xFFFF_FFFF)),
    "a wav of length 0": ("audio", lambda: with_data_size(0)),
    "a wav with something behind it": ("audio", lambda: make_wav(1) + b"LIST\4\0\0\0abcd"),
    "an mp4 with something behind it": ("video", lambda: make_clip(1) + b"\0" * 100),
    "an mp4 with text behind it": ("video", lambda: make_clip(1) + b"the end of this file"),
    "an mp3 behind a tag": (
        "audio",
        lambda: (
            b"ID3\4\0\0\0\0\1\0" + bytes(128) + make_sound(1, codec="libmp3lame", container="mp3")
        ),
    ),
    "an mp3 without its last tag": (
        "audio",
        lambda: make_sound(1, codec="libmp3lame", container="mp3")[:-128],
    ),
}


@pytest.mark.parametrize(("modality", "make"), WHOLE.values(), ids=WHOLE.keys())
def test_a_file_that_is_odd_but_whole_is_served(modality: str, make: Make) -> None:
    assert engine_refusal(make(), modality) is None
    assert gateway_refusal(make(), modality) is None


HOSTILE = {
    "boxes of no size": struct.pack(">I4s", 0, b"ftyp") + b"x" * 100,
    "a box of one byte": struct.pack(">I4s", 1, b"ftyp"),
    "many small boxes": struct.pack(">I4s", 8, b"free") * 300_000,
    "many small chunks": b"RIFF\0\0\0\0WAVE" + b"junk\0\0\0\0" * 300_000,
    "an ogg of one mark": b"OggS",
    "a matroska without sizes": b"\x1aE\xdf\xa3\0\0\0",
    "a matroska of ones": b"\x1aE\xdf\xa3" + b"\xff" * 20,
    "a tag without a file": b"ID3\4\0\0\x7f\x7f\x7f\x7f",
    "a sync word": b"\xff\xfb",
    "nothing": b"",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_structures_that_make_no_sense_are_looked_at_in_bounds(data: bytes, tmp_path: Path) -> None:
    assert missing_bytes(io.BytesIO(data)) is None or data == b"OggS"
    path = tmp_path / "file"
    path.write_bytes(data)
    with path.open("rb") as file:
        missing_bytes(file)
        assert file.tell() == 0


def test_a_stated_duration_may_be_rounded() -> None:
    assert missing_seconds("flac", 10.0, 9.8)
    assert not missing_seconds("flac", 10.0, 9.95)
    assert missing_seconds("matroska,webm", 100.0, 89.0)
    assert not missing_seconds("matroska,webm", 100.0, 91.0)
    assert not missing_seconds("mp3", 100.0, 1.0)
