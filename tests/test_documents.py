"""Pages for users: links lead somewhere, and what can be set or read is documented."""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from pydantic import BaseModel

from ep_serve.cli import add_serve
from ep_serve.contract.generation import MAX_ENTRIES
from ep_serve.contract.media_tokens import MEDIA_TOKENS
from ep_serve.contract.request_options import RequestOptions
from ep_serve.gateway.api.chat_request import CLOSED_FIELDS
from ep_serve.gateway.keys import Key
from ep_serve.gateway.metrics import Metrics
from ep_serve.gateway.settings import GatewaySettings

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
README_LINES = 180


def pages() -> list[Path]:
    """Every page under version control, or not ignored by it."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "--", "*.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:  # unpacked without its history
        own = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")
        folders = ("deploy", "docs", "ep_serve", "loadtest")
        inner = (page for folder in folders for page in (ROOT / folder).rglob("*.md"))
        return [*(ROOT / name for name in own), *inner]
    return [page for name in done.stdout.split() if (page := ROOT / name).is_file()]


def without_code(text: str) -> str:
    """A page without its fenced blocks and code spans."""
    text = re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    found: Counter[str] = Counter()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", text, re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[anchor] += 1
    repeated = {f"{name}-{i}" for name, count in found.items() for i in range(1, count)}
    return frozenset(found) | repeated


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(\s*([^)\s]+)", without_code(page.read_text())):
        if re.match(r"[a-z][a-z+.-]*:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        inside = file.is_relative_to(ROOT) and file.exists()
        if not inside or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


def test_a_missing_heading_is_found() -> None:
    assert "known-limits" in anchors(ROOT / "README.md")
    assert "unknown-limits" not in anchors(ROOT / "README.md")


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


def test_the_readme_links_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in DOCS.glob("*.md") if f"(docs/{page.name})" not in text] == []


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_a_page_begins_with_what_its_reader_can_do(page: Path) -> None:
    assert page.read_text().split("\n\n")[1].startswith("After this page you")


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(
        r"`((?:ep_serve|tests|scripts|deploy|docker|loadtest)/[\w./-]*)`", text(page)
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_target_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"`make ([a-z-]+)", text(page)))
    assert named <= set(re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.MULTILINE))


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_parse(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL):
        ast.parse(block)


@cache
def text(page: Path) -> str:
    return page.read_text()


def undocumented(names: set[str], page: str) -> list[str]:
    content = text(DOCS / page)
    return sorted(name for name in names if f"`{name}`" not in content)


def test_every_request_field_is_documented() -> None:
    names = {*RequestOptions.model_fields, *CLOSED_FIELDS, *MAX_ENTRIES}
    assert undocumented(names, "client-guide.md") == []
    assert any(f"`{token}`" in text(DOCS / "client-guide.md") for token in MEDIA_TOKENS)


def test_every_error_code_of_the_gateway_is_documented() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "ep_serve/gateway").rglob("*.py"))
    codes = set(re.findall(r'\bcode="([a-z_]+)"', sources))
    assert codes
    assert undocumented(codes, "client-guide.md") == []


def test_every_option_of_serve_is_documented() -> None:
    parser = argparse.ArgumentParser()
    groups = parser.add_subparsers()
    add_serve(groups)
    options = groups.choices["serve"]._option_string_actions
    own = {name for name in options if name.startswith("--") and name != "--help"}
    gateway = {"--gateway", "--gateway-config", "--playground"}
    assert undocumented(own - gateway, "serving.md") == []
    assert [name for name in gateway if name not in text(DOCS / "gateway.md")] == []


def test_every_setting_of_the_gateway_is_documented() -> None:
    assert undocumented(set(paths(GatewaySettings)), "gateway.md") == []
    assert undocumented(set(Key.model_fields), "gateway.md") == []


def paths(model: type[BaseModel], before: str = "") -> list[str]:
    """The settings of a section, by their paths."""
    found = []
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        path = f"{before}{name}"
        found += paths(section, f"{path}.") if section else [path]
    return found


def test_every_series_of_the_gateway_is_documented() -> None:
    series = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in Metrics().registry.collect()
    }
    assert undocumented(series, "metrics.md") == []


def test_every_documented_series_exists() -> None:
    documented = set(re.findall(r"`(ep_serve_[a-z_]+)`", text(DOCS / "metrics.md")))
    sources = "".join(path.read_text() for path in (ROOT / "ep_serve").rglob("metrics.py"))
    names = set(re.findall(r'"([a-z_]+)"', sources))
    for name in documented:
        base = name.removeprefix("ep_serve_gateway_").removesuffix("_total")
        assert base in names or name.removesuffix("_total") in names, name
