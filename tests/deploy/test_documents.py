"""What the operators' pages say is still so."""

from __future__ import annotations

import re

import pytest

from tests.deploy.chart import ROOT, example
from tests.deploy.test_schemas import load_program

README = (ROOT / "deploy" / "README.md").read_text()


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
