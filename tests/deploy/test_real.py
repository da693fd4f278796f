"""The processes of the chart, run here as the chart says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.chart import ROOT
from tests.deploy.sandbox import reason_against
from tests.deploy.test_monitoring import ENGINE_SERIES, samples


@pytest.mark.engine
@pytest.mark.skipif(bool(reason_against()), reason=reason_against())
def test_the_rendered_processes_serve_and_end_without_losing_a_stream(tmp_path: Path) -> None:
    """`try_chart` says what is done; the engine's metrics are those that dashboards may ask for."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.deploy.try_chart", f"--keep={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = samples((tmp_path / "engine.metrics").read_text())
    assert set(ENGINE_SERIES.read_text().split()) <= found
