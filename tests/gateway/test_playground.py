"""What the gateway serves at `/playground`, and what it does not."""

from __future__ import annotations

import argparse
import re
from importlib import resources
from typing import Any

import pytest

from ep_serve import cli, node
from ep_serve.gateway import playground
from ep_serve.gateway.api.app import create_app
from ep_serve.gateway.command import add_options, run
from tests.gateway.conftest import MakeWorld
from tests.gateway.test_api import check_error

pytestmark = pytest.mark.anyio

FILES = {file.name: file for file in resources.files(playground).joinpath("page").iterdir()}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
ENABLED: dict[str, Any] = {"playground": {"enabled": True}}


def path_of(name: str) -> str:
    return "/playground" if name == "index.html" else f"/playground/{name}"


async def test_there_is_no_page_unless_it_is_switched_on(world: MakeWorld) -> None:
    async with world() as w:
        for path in ("/playground", "/playground/", *map(path_of, FILES)):
            check_error(await w.client.get(path), 404, "unknown_path")


@pytest.mark.parametrize("name", sorted(FILES))
async def test_every_file_is_served_with_its_type_and_a_strict_policy(
    world: MakeWorld, name: str
) -> None:
    async with world(**ENABLED) as w:
        answer = await w.client.get(path_of(name))
        assert (answer.status_code, answer.content) == (200, FILES[name].read_bytes())
        headers = answer.headers
        assert headers["content-type"].partition(";")[0] == KINDS[name.rpartition(".")[2]]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        policy = dict(item.split(" ", 1) for item in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"]


async def test_a_file_that_did_not_change_is_not_sent_again(world: MakeWorld) -> None:
    async with world(**ENABLED) as w:
        first = await w.client.get("/playground")
        known = {"if-none-match": first.headers["etag"]}
        again = await w.client.get("/playground", headers=known)
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["content-security-policy"] == first.headers["content-security-policy"]


@pytest.mark.parametrize("path", ["/routes.py", "/../routes.py", "/page/main.js", "/%2e%2e/app.py"])
async def test_nothing_but_the_files_of_the_page_is_served(world: MakeWorld, path: str) -> None:
    async with world(**ENABLED) as w:
        check_error(await w.client.get(f"/playground{path}"), 404, "unknown_path")


async def test_the_page_needs_no_key_and_tells_nothing_of_the_gateway(world: MakeWorld) -> None:
    async with world() as w:
        without = create_app(w.gateway).openapi()
    async with world(keys=[{"name": "anna"}], **ENABLED) as w:
        assert (await w.client.get("/playground")).status_code == 200
        assert (await w.client.get("/v1/models")).status_code == 401
        assert create_app(w.gateway).openapi() == without


async def test_a_trailing_slash_is_redirected_below_any_prefix(world: MakeWorld) -> None:
    async with world(**ENABLED) as w:
        answer = await w.client.get("/playground/")
        assert (answer.status_code, answer.headers["location"]) == (307, "../playground")


def test_the_page_names_no_other_server_and_no_absolute_path() -> None:
    for name, file in FILES.items():
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|[\"'(]//?\w", text), name


def test_the_page_has_neither_inline_scripts_nor_inline_styles() -> None:
    page = FILES["index.html"].read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert re.findall(r"<script[^>]*>(.*?)</script>", page, re.DOTALL) == [""]
    for name, file in FILES.items():
        markup = re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(", file.read_text())
        assert markup is None, name


def test_the_option_switches_the_page_on(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    words = ["--upstream", "http://127.0.0.1:8000", "--print-config"]
    assert run(parser.parse_args(words)) == 0
    assert "playground:\n  enabled: false" in capsys.readouterr().out
    assert run(parser.parse_args([*words, "--playground"])) == 0
    assert "playground:\n  enabled: true" in capsys.readouterr().out


def test_a_node_with_a_playground_has_a_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def start(*given: Any) -> int:
        started.append(given)
        return 0

    monkeypatch.setattr("ep_serve.engine.server.serve.problems", lambda _: [])
    monkeypatch.setattr(node, "serve_with_gateway", start)
    assert cli.main(["serve", "here", "--playground", "--port", "9", "--enforce-eager"]) == 0
    assert started == [("here", ["--enforce-eager"], ["--port", "9", "--playground"])]
