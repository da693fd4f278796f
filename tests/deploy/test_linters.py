"""Linters over the Dockerfiles and over what the chart renders.

checkov needs a hundred packages, so it is not among the tools of development. Where it is installed
the test finds it, or takes it from the environment:

    CHECKOV=/path/to/checkov pytest tests/deploy -k checkov
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.chart import EXAMPLES, ROOT, program, render
from tests.deploy.dockerfile import DOCKER

CHECKOV = os.environ.get("CHECKOV") or shutil.which("checkov") or ""


@pytest.mark.parametrize("file", sorted(DOCKER.glob("*.Dockerfile")), ids=lambda file: file.stem)
def test_hadolint_reports_nothing(file: Path) -> None:
    done = subprocess.run(
        [program("hadolint"), str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not CHECKOV, reason="checkov is not installed, and CHECKOV names none")
def test_checkov_finds_nothing_that_is_not_listed(tmp_path: Path) -> None:
    """deploy/checkov.yaml lists what is skipped, with the reasons."""
    for file in EXAMPLES:
        text = yaml.safe_dump_all([in_a_namespace(item) for item in render(file).objects])
        (tmp_path / file.name).write_text(text)
    command = [CHECKOV, "--config-file", str(ROOT / "deploy" / "checkov.yaml"), "--output=json"]
    command += [f"--directory={tmp_path}", f"--directory={DOCKER}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.lstrip()[:1] in {"{", "["}, done.stderr[-2000:]
    reports = reports_in(done.stdout)
    for report in reports:
        failed = [f"{item['check_id']} {item['resource']}: {item['check_name']}"
                  for item in report["results"]["failed_checks"]]  # fmt: skip
        assert not failed
        assert report["summary"]["passed"] > 100
        assert report["summary"]["parsing_errors"] == 0
    assert {report["check_type"] for report in reports} == {"kubernetes", "dockerfile"}


def in_a_namespace(item: dict[str, Any]) -> dict[str, Any]:
    """The object where an installation puts it: checkov finds fault with `default`."""
    return {**item, "metadata": {**item["metadata"], "namespace": "omni"}}


def reports_in(text: str) -> list[dict[str, Any]]:
    """Checkov's reports: several JSON documents, one or a list of reports in each."""
    found = []
    while text := text.lstrip():
        document, end = json.JSONDecoder().raw_decode(text)
        found += document if isinstance(document, list) else [document]
        text = text[end:]
    return [document for document in found if "results" in document]
