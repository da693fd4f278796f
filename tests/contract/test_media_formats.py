"""The gateway lets through what the engine decodes, and nothing else."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from av.stream import Disposition

from ep_serve.contract.media_formats import default_track, unsupported_format, webp_size
from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.media import service
from ep_serve.gateway.media.parts import Modality
from ep_serve.gateway.media.probe import inspection
from ep_serve.media import (
    MediaError,
    MediaLimits,
    SamplingRule,
    decode_clip,
    decode_image,
    decode_sound,
)
from tests.clips import make_clip, make_image, make_sound
from tests.contract.media_files import ANIMATED, CLIPS, SOUNDS, STILL, Make, asf, tracks

LIMITS = MediaLimits()
BOUNDS = inspection.Bounds(1_800, 216_000, 8_192 * 4_320, 200.0)
MODALITIES = get_args(Modality)
DECODE: dict[str, Callable[[bytes], object]] = {
    "image": lambda data: decode_image(data, LIMITS),
    "video": lambda data: decode_clip(data, SamplingRule(), LIMITS),
    "audio": lambda data: decode_sound(data, LIMITS),
}


def engine_refusal(data: bytes, modality: str) -> str | None:
    try:
        DECODE[modality](data)
    except MediaError as error:
        return str(error)
    return None


def gateway_refusal(data: bytes, modality: Any) -> str | None:
    try:
        facts = inspection.probe(io.BytesIO(data), BOUNDS).as_dict()
        service._check_modality(modality, facts, "messages[0]")
    except inspection.RefusedError as error:
        return error.reason
    except ApiError as error:
        return error.message
    return None


FILES = {**STILL, **ANIMATED, **CLIPS, **SOUNDS, "asf": asf}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
def test_engine_and_gateway_serve_the_same_files(make: Make) -> None:
    data = make()
    for modality in MODALITIES:
        refusals = engine_refusal(data, modality), gateway_refusal(data, modality)
        assert (refusals[0] is None) == (refusals[1] is None), (modality, refusals)


def test_animations_are_pictures() -> None:
    for name in ("WEBP", "PNG", "GIF", "AVIF"):
        data = ANIMATED[f"animated {name}"]()
        assert engine_refusal(data, "image") is None, name
        assert gateway_refusal(data, "image") is None, name


NAMED: dict[str, tuple[Make, str]] = {
    "asf": (asf, "ASF (WMV, WMA)"),
    "tiff": (STILL["TIFF"], "TIFF"),
    "jpeg 2000": (STILL["JPEG2000"], "JPEG 2000"),
    "aiff": (SOUNDS["aiff pcm_s16be"], "AIFF"),
    "au": (SOUNDS["au pcm_s16be"], "AU"),
    "caf": (SOUNDS["caf pcm_s16le"], "CAF"),
    "amr": (SOUNDS["amr"], "AMR"),
    "wave64": (SOUNDS["w64 pcm_s16le"], "Wave64"),
}


@pytest.mark.parametrize(("make", "name"), NAMED.values(), ids=NAMED.keys())
def test_common_unsupported_formats_are_named(make: Make, name: str) -> None:
    data = make()
    for modality in MODALITIES:
        sentence = f"is in the format {name}, which is not served"
        assert engine_refusal(data, modality) in [f"the {what} {sentence}" for what in WHAT]
        assert gateway_refusal(data, modality) == sentence


WHAT = ("image", "video", "sound")


def test_served_files_are_not_taken_for_others() -> None:
    for data in (make_clip(1), make_sound(1), make_image(), make_image(fmt="AVIF")):
        assert unsupported_format(data[:64]) is None


def test_the_size_of_an_extended_webp_is_in_its_head() -> None:
    assert webp_size(ANIMATED["animated WEBP"]()[:64]) == (112, 112)
    assert webp_size(make_image(fmt="WEBP")[:64]) is None
    assert webp_size(make_image()[:64]) is None


@pytest.mark.parametrize(
    ("flags", "used"),
    [((False, False), 0), ((False, True), 1), ((True, True), 0), ((False, False, True), 2)],
)
def test_the_track_used_is_the_first_default_one_or_else_the_first(
    flags: tuple[bool, ...], used: int
) -> None:
    seconds = [1.0, 2.0, 3.0][: len(flags)]
    listed = [SimpleNamespace(disposition=int(flag)) for flag in flags]
    assert default_track(listed) is listed[used]
    data = tracks("matroska", flags=flags, seconds=seconds)
    assert len(decode_sound(data, LIMITS)) / 16_000 == pytest.approx(seconds[used], abs=0.2)


def test_cover_art_does_not_count_as_a_track() -> None:
    cover = SimpleNamespace(disposition=Disposition.attached_pic | Disposition.default)
    film = SimpleNamespace(disposition=0)
    assert default_track([cover, film]) is film
    assert default_track([cover]) is None


def test_the_gateway_probes_the_track_that_the_engine_decodes() -> None:
    data = bytearray(tracks("matroska", flags=(False, True), seconds=(1.0, 1.0)))
    first = data.index(b"A_AAC")
    data[first : first + 5] = b"A_XYZ"
    for refusal in (engine_refusal, gateway_refusal):
        assert refusal(bytes(data), "audio") is None
    second = data.index(b"A_AAC")
    data[second : second + 5] = b"A_XYZ"
    for refusal in (engine_refusal, gateway_refusal):
        assert "codec" in (refusal(bytes(data), "audio") or "")
