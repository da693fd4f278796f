"""The processes of the chart, run here as the chart says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.chart import ROOT
from tests.deploy.test_monitoring import ENGINE_SERIES, samples
from tests.deploy.try_chart import reason_against_pods


@pytest.mark.engine
@pytest.mark.timeout(1_200)
@pytest.mark.skipif(bool(reason_against_pods()), reason=reason_against_pods())
def test_the_rendered_processes_serve_and_end_without_losing_a_stream(tmp_path: Path) -> None:
    """`try_chart` says what is done; the engine's metrics are those that dashboards may ask for."""
    output, code = run_trial(tmp_path)
    assert code == 0, output
    found = samples((tmp_path / "engine.metrics").read_text())
    assert set(ENGINE_SERIES.read_text().split()) <= found


def run_trial(folder: Path) -> tuple[str, int]:
    """Output and exit code; what it started ends with it, also when the test is broken off."""
    command = [sys.executable, "-m", "tests.deploy.try_chart", f"--keep={folder}"]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as trial:
        try:
            output = trial.communicate()[0]
        except BaseException:
            trial.terminate()
            raise
        return output, trial.returncode
