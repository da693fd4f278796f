from __future__ import annotations

import pytest
from pydantic import ValidationError
from vllm.exceptions import VLLMValidationError

from ep_serve.engine.settings import EngineSettings, MediaSettings, Settings


def settings(**media: object) -> Settings:
    return Settings(
        media=MediaSettings(**media),  # type: ignore[arg-type]
        engine=EngineSettings(),
        keep_ratio=0.2,
        max_full_tokens=1000,
    )


def test_a_request_without_fields_gets_the_servers_options() -> None:
    options = settings(fps=1.0, max_pixels=200_704).merge({})
    assert (options.keep_ratio, options.fps, options.max_pixels) == (0.2, 1.0, 200_704)
    assert options.sound


def test_a_request_overrides_inside_the_bounds() -> None:
    options = settings(max_pixels=200_704).merge(
        {"keep_ratio": 1, "fps": 0.5, "max_pixels": 100_352, "use_audio_in_video": False}
    )
    assert options.model_dump() == {
        "keep_ratio": 1.0,
        "fps": 0.5,
        "min_pixels": None,
        "max_pixels": 100_352,
        "sound": False,
    }


def test_fewer_pixels_than_the_servers_minimum_may_be_asked_for() -> None:
    options = settings(min_pixels=100_352, max_pixels=200_704).merge({"max_pixels": 3136})
    assert (options.min_pixels, options.max_pixels) == (3136, 3136)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("keep_ratio", 0),
        ("keep_ratio", 1.01),
        ("keep_ratio", float("nan")),
        ("keep_ratio", True),
        ("keep_ratio", "0.2"),
        ("fps", 4.5),
        ("fps", 0),
        ("fps", float("inf")),
        ("max_pixels", 200_705),
        ("min_pixels", 10),
        ("max_pixels", 100_000.5),
        ("use_audio_in_video", "yes"),
        ("frames", 3),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(VLLMValidationError, match=field):
        settings(max_pixels=200_704).merge({field: value})


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValidationError, match="min_pixels"):
        MediaSettings(min_pixels=5000, max_pixels=4000)
    with pytest.raises(ValidationError, match="max_fps"):
        MediaSettings(fps=8.0)
