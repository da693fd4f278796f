"""The configuration: where it comes from, and what a person is told about mistakes."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from ep_serve.gateway.command import add_options, run
from ep_serve.gateway.server import running
from ep_serve.gateway.settings import GatewaySettings, SettingsError, load, to_yaml

UPSTREAM = ["http://127.0.0.1:8000"]


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(words)


def test_options_override_the_environment_which_overrides_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("upstreams: [http://a:1]\nport: 1\nstore: {quota_bytes: 1, media_ttl_s: 7}\n")
    monkeypatch.setenv("EP_SERVE_GATEWAY_PORT", "2")
    monkeypatch.setenv("EP_SERVE_GATEWAY_STORE__QUOTA_BYTES", "2")
    settings = load(file, {"port": 3})
    assert settings.port == 3
    assert settings.store.quota_bytes == 2
    assert settings.store.media_ttl_s == 7


def test_the_printed_configuration_is_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments("--upstream", UPSTREAM[0], "--print-config")) == 0
    printed = capsys.readouterr().out
    file = tmp_path / "g.yaml"
    file.write_text(printed)
    assert to_yaml(load(file)) == printed
    assert set(yaml.safe_load(printed)) == set(GatewaySettings.model_fields)


def test_a_printed_configuration_hides_secrets() -> None:
    settings = load(None, {"upstreams": UPSTREAM, "upstream_api_key": "hush"})
    assert "hush" not in to_yaml(settings)


def test_every_mistake_is_named(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("upstreams: [ftp://a]\nport: 99999\nqueue: {max: 3}\nnonsense: 1\n")
    with pytest.raises(SettingsError) as error:
        load(file)
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert "port: Input should be less than or equal to 65535 (got 99999)" in lines
    assert "queue.max: unknown setting" in lines
    assert "nonsense: unknown setting" in lines


def numbers(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a model has numbers."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        if float in kinds or int in kinds:
            yield (*path, name)
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from numbers(kind, (*path, name))


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("path", [".".join(path) for path in numbers(GatewaySettings)])
def test_a_number_is_finite(tmp_path: Path, path: str, value: str) -> None:
    file = tmp_path / "g.yaml"
    nested: Any = yaml.safe_load(value)
    for name in reversed(path.split(".")):
        nested = {name: nested}
    if path.startswith("store.s3"):
        nested["store"]["s3"]["bucket"] = "media"
    file.write_text(yaml.safe_dump({"upstreams": UPSTREAM, **nested}))
    with pytest.raises(SettingsError, match=rf"^{path}: "):
        load(file)


def test_a_setting_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("upstreams: [http://a]\nqueue:\n  timeout_s: 1\n  timeout_s: 2\n")
    with pytest.raises(SettingsError, match=r"g\.yaml: has a key for the second time in line 4"):
        load(file)


@pytest.mark.parametrize(
    "text", ["[1, 2]", "a: [", "\x00", "a: 2020-99-99", "[" * 100_000, "1: 2", "null: 1"]
)
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "g.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=r"g\.yaml"):
        load(file)


def test_a_missing_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments("--config", "/nowhere/g.yaml")) == 1
    assert "/nowhere/g.yaml: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url",
    ["http://u:p@a", "http://a/v1", "http://a/?x=1", "a:8000", "file:///x", f"http://{'a' * 64}"],
)
def test_an_upstream_is_a_plain_base_url(url: str) -> None:
    with pytest.raises(SettingsError, match="upstreams"):
        load(None, {"upstreams": [url]})


def test_no_upstream_is_a_mistake() -> None:
    with pytest.raises(SettingsError, match="--upstream"):
        load(None)


@pytest.mark.anyio
@pytest.mark.parametrize("host", ["no such host", "a" * 64])
async def test_an_invalid_host_is_a_readable_error(tmp_path: Path, host: str) -> None:
    options = {"upstreams": UPSTREAM, "host": host, "allow_anonymous": True, "port": 0}
    settings = load(None, {**options, "store": {"path": tmp_path / "store"}})
    with pytest.raises(SettingsError, match=r"^port: cannot listen on"):
        async with running(settings):
            pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "gateway.example.org"])
def test_it_refuses_to_start_without_keys_off_loopback(host: str) -> None:
    with pytest.raises(SettingsError, match="keys_file"):
        load(None, {"upstreams": UPSTREAM, "host": host})
    assert load(None, {"upstreams": UPSTREAM, "host": host, "allow_anonymous": True})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_it_starts_without_keys_on_loopback(host: str) -> None:
    assert load(None, {"upstreams": UPSTREAM, "host": host}).keys_file is None


def test_engines_need_an_address_to_fetch_media_from() -> None:
    internal = {"host": "0.0.0.0", "port": 8081}
    with pytest.raises(SettingsError, match=r"internal\.url"):
        load(None, {"upstreams": UPSTREAM, "internal": internal})
    internal["url"] = "http://10.0.0.5:8081"
    assert load(None, {"upstreams": UPSTREAM, "internal": internal})


def test_a_new_key_is_printed_with_its_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments("--new-key", "alice")) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["keys"][0]["name"] == "alice"
    assert "sk-ep-" in printed


def test_a_bucket_is_named_in_the_file_and_its_keys_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "g.yaml"
    file.write_text("upstreams: [http://a]\nstore: {s3: {bucket: media, prefix: a/b}}\n")
    assert load(None, {"upstreams": UPSTREAM}).store.s3 is None
    monkeypatch.setenv("EP_SERVE_GATEWAY_STORE__S3__ACCESS_KEY_ID", "name-of-a-key")
    with pytest.raises(SettingsError, match="both access_key_id and secret_access_key"):
        load(file)
    monkeypatch.setenv("EP_SERVE_GATEWAY_STORE__S3__SECRET_ACCESS_KEY", "hush")
    settings = load(file)
    assert settings.store.s3 is not None
    assert settings.store.s3.bucket == "media"
    assert "hush" not in to_yaml(settings)
    assert "name-of-a-key" not in to_yaml(settings)


@pytest.mark.parametrize(
    "s3", [{}, {"bucket": "a/b"}, {"bucket": "a", "prefix": "/a"}, {"bucket": "a", "endpoint": "x"}]
)
def test_a_bucket_that_cannot_be_is_refused(s3: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"^store\.s3\."):
        load(None, {"upstreams": UPSTREAM, "store": {"s3": s3}})
