"""The request fields that EP-Serve adds to the OpenAI API, and their bounds.

A server's settings may restrict a field further.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core.core_schema import ValidationInfo

TOKEN_PIXELS = 28 * 28
"""Pixels of a frame or image for each token (14 x 14 patches, merged 2 x 2)."""
FRAME_PIXELS = 768 * TOKEN_PIXELS
"""Default limit of pixels of a video frame, from the model's processor."""
MAX_PIXELS = 16_384 * TOKEN_PIXELS
"""Maximum pixels of an image: the limit of Qwen2.5-Omni's image processor."""
MIN_FPS, MAX_FPS = 0.001, 60.0
"""Bounds of the frames sampled from each second of a video."""

_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Pixels = Annotated[int, Field(ge=TOKEN_PIXELS, le=MAX_PIXELS)]


class RequestOptions(BaseModel):
    """Options of one request; None stands for the server's setting."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, strict=True, use_attribute_docstrings=True
    )

    keep_ratio: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    """Fraction of the audio, video and image tokens to keep."""
    rho_audio: _Share | None = None
    """Fraction of the audio tokens to drop, for sieves that reduce modalities separately."""
    rho_video: _Share | None = None
    """Fraction of the video tokens to drop, for sieves that reduce modalities separately."""
    fps: Annotated[float, Field(ge=MIN_FPS, le=MAX_FPS, allow_inf_nan=False)] | None = None
    """Frames sampled from each second of a video."""
    max_pixels: _Pixels | None = None
    """Larger frames and pictures are shrunk to this many pixels."""
    min_pixels: _Pixels | None = None
    """Smaller frames and pictures are enlarged to this many pixels."""
    use_audio_in_video: bool | None = None
    """Whether the sound track of a video is used."""
    return_selection: bool | None = None
    """Report in `usage.reduction.selection` which tokens were kept."""

    @field_validator("min_pixels")
    @classmethod
    def _at_most_max_pixels(cls, value: int | None, info: ValidationInfo) -> int | None:
        largest = info.data.get("max_pixels")
        if value is not None and largest is not None and value > largest:
            raise ValueError(f"must be at most max_pixels, {largest}")
        return value


def describe_option_error(error: ValidationError) -> tuple[str, str]:
    """Return the invalid field and a message that names it, its bounds and its value."""
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0])
    own = first["type"] == "value_error"
    reason = first["msg"].removeprefix("Value error, ") if own else f"must be {_range(name)}"
    given = first["input"]
    # Python refuses to print integers of thousands of digits.
    printable = isinstance(given, float) or (isinstance(given, int) and abs(given) < 10**18)
    shown = f" (got {given!r})" if printable else ""
    return name, f"{name} {reason}{shown}."


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of each field by its name."""
    properties: dict[str, Any] = RequestOptions.model_json_schema()["properties"]
    return properties


def _range(name: str) -> str:
    """Describe the type and the bounds of a field."""
    schema = json_schema()[name]["anyOf"][0]
    if schema["type"] == "boolean":
        return "true or false"
    noun = "an integer" if schema["type"] == "integer" else "a number"
    above = schema.get("exclusiveMinimum")
    low = f"at least {schema['minimum']}" if above is None else f"greater than {above}"
    return f"{noun}, {low} and at most {schema['maximum']}"
