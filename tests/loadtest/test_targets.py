from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from loadtest.__main__ import parser
from loadtest.options import Setup, server_settings
from loadtest.targets import ServerSettings, Target

SETTINGS = ServerSettings(Path("ours"), Path("stock"), max_model_len=6144)


def parsed(*words: str) -> argparse.Namespace:
    return parser().parse_args(["run", *words])


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_stock_uses_the_audio_and_two_frames_a_second() -> None:
    target = Target.parse("stock")
    assert target.fields == {"mm_processor_kwargs": {"use_audio_in_video": True}}
    options = SETTINGS.options(target)
    assert json.loads(option(options, "--media-io-kwargs"))["video"]["fps"] == 2
    assert "--trust-request-mm-kwargs" in options
    assert SETTINGS.checkpoint(target) == Path("stock")
    assert SETTINGS.module(target) == ("-m", "loadtest.stock_server")


def test_no_reduction_is_this_engine_on_the_stock_twin() -> None:
    target = Target.parse("none")
    assert option(SETTINGS.options(target), "--sieve") == "none"
    assert SETTINGS.checkpoint(target) == Path("stock")
    assert target.fields == {}


def test_keep_ratios_share_one_server() -> None:
    a, b = Target.parse("0.2"), Target.parse("0.05")
    assert a.server == b.server
    assert (a.fields, b.fields) == ({"keep_ratio": 0.2}, {"keep_ratio": 0.05})
    assert SETTINGS.checkpoint(a) == Path("ours")
    assert "--sieve" not in SETTINGS.options(a)


def test_another_sieve_has_a_server_of_its_own() -> None:
    target = Target.parse("omnizip@0.35")
    assert (target.server, target.fields) == ("omnizip", {"keep_ratio": 0.35})
    assert option(SETTINGS.options(target), "--sieve") == "omnizip"
    assert option(SETTINGS.options(target), "--keep-ratio") == "0.35"
    assert SETTINGS.checkpoint(target) == Path("stock")


@pytest.mark.parametrize("name", ["0", "1.5", "-0.1", "nan", "fast", "plain"])
def test_a_target_that_makes_no_sense_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"keep ratio|neither a target"):
        Target.parse(name)


def test_a_server_elsewhere_takes_plain_requests_and_keep_ratios() -> None:
    assert Target.parse("plain", remote=True).fields == {}
    assert Target.parse("0.1", remote=True).fields == {"keep_ratio": 0.1}
    with pytest.raises(ValueError, match="stock"):
        Target.parse("stock", remote=True)


def test_sequences_are_long_enough_for_the_longest_clip() -> None:
    args = parsed("--seconds", "10", "30", "--eager")
    settings = server_settings(args, Path("ours"), Path("stock"))
    assert settings.max_model_len == 6144
    assert settings.extra == ("--enforce-eager",)


def test_defaults_are_a_small_comparison() -> None:
    setup = Setup.from_args(parsed())
    assert [target.name for target in setup.targets] == ["stock", "none", "0.2", "0.05"]
    assert [load.label for load in setup.plan.loads] == ["c=1", "c=2"]
    assert setup.baseline == "stock"
    assert set(setup.plan.scenarios) == {"unique"}


def test_a_closed_loop_has_at_least_twice_its_concurrency() -> None:
    plan = Setup.from_args(parsed("--concurrency", "1", "8")).plan
    assert [plan.count(load) for load in plan.loads] == [3, 16]


def test_rates_take_the_place_of_the_default_loops() -> None:
    loads = Setup.from_args(parsed("--rate", "0.5", "--arrivals", "gamma")).plan.loads
    assert [load.label for load in loads] == ["gamma 0.5/s"]


def test_unique_and_repeated_media_are_kept_apart() -> None:
    scenarios = Setup.from_args(parsed("--media", "unique", "repeated")).plan.scenarios
    assert scenarios["unique"].repeat_media == 0
    assert scenarios["repeated"].repeat_media == 0.5


def test_the_key_of_a_server_is_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOADTEST_API_KEY", "sk-1")
    setup = Setup.from_args(parsed("--url", "http://host/v1/"))
    assert setup.headers == {"authorization": "Bearer sk-1"}
    assert setup.url == "http://host/v1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--search", "8"], "--search needs a service level"),
        (["--concurrency", "0"], "--concurrency must be above 0"),
        (["--rate", "-1"], "--rate must be above 0"),
        (["--requests", "0"], "--requests must be at least 1"),
        (["--shape", "huge"], "--shape must be one of"),
        (["--seconds", "0"], "seconds must be above 0"),
        (["--burstiness", "0"], "--burstiness must be above 0"),
    ],
)
def test_invalid_options_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setup.from_args(parsed(*words))
