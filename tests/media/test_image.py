from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ep_serve.media import MediaError, MediaLimits, decode_image, decodes
from tests.clips import make_image, make_picture, make_png_header, read_number

LIMITS = MediaLimits()


def _save(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, fmt, **options)
    return file.getvalue()


def test_an_image_is_contiguous_rgb() -> None:
    image = decode_image(make_image(140, 112, number=7), LIMITS)
    np.testing.assert_array_equal(image, make_picture(7, (140, 112)))
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    assert image.flags.writeable


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"])
def test_every_format_is_served(fmt: str) -> None:
    assert read_number(decode_image(make_image(fmt=fmt, number=77), LIMITS)) == 77


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_in_exif_data_is_applied(orientation: int) -> None:
    upright = Image.fromarray(make_picture(5, (140, 112)))
    undo = {
        **{2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180},
        **{4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE},
        **{6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE},
        **{8: Image.Transpose.ROTATE_270},
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    image = decode_image(_save(stored, exif=exif), LIMITS)
    np.testing.assert_array_equal(image, np.asarray(upright))


def test_damaged_exif_data_does_not_spoil_an_image() -> None:
    image = decode_image(make_image(fmt="JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), LIMITS)
    assert image.shape == (112, 140, 3)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_laid_over_white(mode: str) -> None:
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    half.paste((0, 0, 0, 255), (0, 0, 8, 4))
    fmt = "GIF" if mode == "PA" else "PNG"
    image = decode_image(_save(half.convert("RGBA" if mode == "PA" else mode), fmt), LIMITS)
    assert (image[:4] == 0).all()
    assert (image[4:] == 255).all()


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.fromarray(make_picture(number)) for number in (11, 12, 13)]
    data = _save(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_number(decode_image(data, LIMITS)) == 11


def test_sixteen_bits_of_grey_are_scaled_to_eight() -> None:
    grey = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    image = decode_image(_save(Image.fromarray(grey)), LIMITS)
    np.testing.assert_array_equal(image[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_images_of_other_modes_become_rgb(mode: str) -> None:
    picture = Image.fromarray(make_picture(3)).convert(mode)
    data = _save(picture, "JPEG" if mode == "CMYK" else "PNG")
    assert read_number(decode_image(data, LIMITS)) == 3


def test_an_image_over_the_limit_is_refused_before_it_is_decoded() -> None:
    sentence = r"^the image has 4000x3000 = 12000000 pixels; the limit is 11000000 pixels$"
    with pytest.raises(MediaError, match=sentence):
        decode_image(make_png_header(4000, 3000), MediaLimits(max_pixels=11_000_000))


def test_an_image_of_400_million_pixels_is_refused() -> None:
    with pytest.raises(MediaError, match="pixels; the limit is 35389440 pixels"):
        decode_image(make_png_header(20_000, 20_000), LIMITS)


def test_an_image_thinner_than_processors_accept_is_refused() -> None:
    with pytest.raises(MediaError, match=r"1000x2 pixels, a ratio of 500 to 1; the limit is 200"):
        decode_image(make_image(1000, 2), LIMITS)


def test_a_jpeg_of_too_many_scans_is_refused() -> None:
    data = make_image(fmt="JPEG", progressive=True)
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    bomb = data[:-2] + scan * 100 + data[-2:]
    with pytest.raises(MediaError, match="scans; the limit is 100 scans"):
        decode_image(bomb, LIMITS)


def test_an_image_counts_as_one_decode() -> None:
    before = decodes.value("image")
    decode_image(make_image(), LIMITS)
    assert decodes.value("image") == before + 1
