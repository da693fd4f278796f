from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from vllm.exceptions import VLLMValidationError

from ep_serve.engine.settings import EngineSettings, MediaSettings, Settings
from ep_serve.sieve import Budget


def settings(sieve: str = "cs2", **media: Any) -> Settings:
    return Settings(
        media=MediaSettings(**media),
        engine=EngineSettings(),
        sieve=sieve,
        refines=sieve == "cs2",
        keep_ratio=0.2 if sieve == "cs2" else None,
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
        "rho_audio": None,
        "rho_video": None,
        "fps": 0.5,
        "min_pixels": None,
        "max_pixels": 100_352,
        "sound": False,
        "return_selection": False,
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
        ("rho_audio", 0.3),
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


def test_a_checkpoint_may_say_how_media_were_processed_and_the_server_wins() -> None:
    config = SimpleNamespace(
        model_type="qwen2_5_omni", media_defaults={"min_pixels": 7056, "max_pixels": 7056}
    )
    own: Any = SimpleNamespace(mm_processor_kwargs={"fps": 1.0, "max_pixels": 12_544})
    model: Any = SimpleNamespace(hf_config=config, multimodal_config=own, max_model_len=100)
    media = Settings._build(model, {"sieve": "uniform"}).media
    assert (media.min_pixels, media.max_pixels, media.fps) == (7056, 12_544, 1.0)


def test_sound_and_picture_can_be_asked_for_one_by_one_where_the_sieve_can() -> None:
    options = settings("omnisift").merge({"rho_audio": 0.4})
    assert options.budget == Budget(rho_audio=0.4)
    assert settings("omnisift").merge({}).budget == Budget()
    assert settings("omnisift", rho_video=0.5).merge({"keep_ratio": 0.3}).budget == Budget(0.3)


@pytest.mark.parametrize("field", ["rho_audio", "rho_video"])
def test_a_rate_beside_a_ratio_is_refused(field: str) -> None:
    with pytest.raises(VLLMValidationError, match=field):
        settings("omnisift").merge({"keep_ratio": 0.3, field: 0.5})


def test_every_setting_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    names = [*MediaSettings.model_fields, *EngineSettings.model_fields]
    assert [name for name in names if f"`{name}`" not in page] == []
