"""A still image as an RGB array."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ep_serve.contract.media_formats import PICTURE_FORMATS
from ep_serve.media.containers import Source, check_format
from ep_serve.media.counter import decodes
from ep_serve.media.errors import MediaError
from ep_serve.media.limits import Deadline, MediaLimits

MAX_JPEG_SCANS = 100
"""Passes over a progressive JPEG, each of which may cost as much as the whole picture."""


def decode_image(data: bytes, limits: MediaLimits) -> NDArray[np.uint8]:
    """Decode an image: (H, W, 3) uint8 RGB, C-contiguous.

    The orientation in EXIF data is applied, transparency is laid over white (as vLLM and
    qwen-vl-utils do), an animation gives its first frame.

    Raises:
        MediaError: the image cannot be read or exceeds a limit.
    """
    with _opened(data, limits) as image:
        decodes.add("image")
        image.load()
        upright: Image.Image = image
        with suppress(Exception):  # damaged EXIF data does not damage the picture
            upright = ImageOps.exif_transpose(image)
        return np.array(_rgb(upright), np.uint8, order="C")


def image_size(data: bytes, limits: MediaLimits) -> tuple[int, int]:
    """(height, width) of an image in pixels, as its header states them.

    Raises:
        MediaError: as `decode_image`, as far as it can be known without decoding.
    """
    with _opened(data, limits) as image:
        return image.height, image.width


@contextmanager
def _opened(data: bytes, limits: MediaLimits) -> Iterator[Image.Image]:
    """Open an image inside the limits; what is raised within the block becomes a `MediaError`."""
    if not data:
        raise MediaError("the image is empty (0 bytes)")
    check_format(data, "image")
    deadline = Deadline(limits.timeout_s)
    try:
        with Image.open(Source(data, deadline), formats=PICTURE_FORMATS) as image:
            limits.check_picture("image", image.height, image.width)
            scans = data.count(b"\xff\xda") if image.format in ("JPEG", "MPO") else 1
            if scans > MAX_JPEG_SCANS:
                raise MediaError(
                    f"the image has {scans} scans; the limit is {MAX_JPEG_SCANS} scans"
                )
            yield image
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        bound = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow's own, met before its size is known
        raise MediaError(
            f"the image has more than {bound} pixels; "
            f"the limit is {min(limits.max_pixels, bound)} pixels"
        ) from error
    except UnidentifiedImageError as error:
        deadline.check()
        raise MediaError(
            f"the image is in none of the formats served ({', '.join(PICTURE_FORMATS)}), "
            "or its header is damaged"
        ) from error
    except Exception as error:  # Pillow's plugins raise errors of every kind on damaged data
        deadline.check()
        raise MediaError("the image is cut short or damaged and cannot be read") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey instead of scaling it
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "RGB" or not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    rgb = Image.new("RGB", rgba.size, "white")
    rgb.paste(rgba, mask=rgba.getchannel("A"))
    return rgb
