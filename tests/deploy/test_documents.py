"""What the operators' pages say is still so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.deploy.chart import ROOT, example
from tests.deploy.test_schemas import load_program

PAGES = [ROOT / "deploy" / "README.md", ROOT / "deploy" / "RUNBOOKS.md"]
README = PAGES[0].read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = ROOT / "deploy" / path if path else page
        assert file.exists(), target
        headings = re.findall(r"^##+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
        anchors = {heading.lower().replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, target


def test_the_sizing_table_is_current() -> None:
    pytest.importorskip("loadtest.shapes")
    program = load_program("../sizing")
    assert program.with_table(README) == README, "run: python deploy/sizing.py"


def test_the_secrets_of_the_page_are_those_of_the_examples() -> None:
    made = set(re.findall(r"kubectl create secret generic (\S+)", README))
    used = {
        volume["secret"]["secretName"]
        for pod in example("air-gapped").pods.values()
        for volume in pod["volumes"]
        if "secret" in volume
    }
    assert used <= made
