"""The driver against AIPerf: the same requests, the same server, the same figures."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ep_serve.checkpoint.embedded import build
from loadtest.__main__ import main
from loadtest.records import Report
from tests.loadtest.mock_server import MockServer, serving

AIPERF = os.environ.get("AIPERF") or shutil.which("aiperf")
"""AIPerf belongs into an environment of its own: `pip install 'aiperf==0.13.*'`."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(AIPERF is None, reason="needs AIPERF=/path/to/aiperf (0.13)"),
]

WORDS = ["--seconds", "1", "--size", "56", "--fps", "4", "--output-tokens", "5", "--model", "m"]
WORDS += ["--targets", "plain", "--repeats", "1", "--requests", "40", "--warmup", "0"]


def run_aiperf(folder: Path) -> dict[str, Any]:
    """Run the script of a folder; what it found."""
    assert AIPERF is not None
    path = f"{Path(AIPERF).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["sh", str(folder / "aiperf.sh")],
        env={**os.environ, "PATH": path},
        check=True,
        capture_output=True,
        timeout=240,
    )
    (found,) = folder.rglob("profile_export_aiperf.json")
    result: dict[str, Any] = json.loads(found.read_text())
    return result


@pytest.mark.parametrize(
    "load", [("--concurrency", "4"), ("--rate", "8", "--arrivals", "constant")]
)
def test_both_generators_measure_the_same(load: tuple[str, ...], tmp_path: Path) -> None:
    checkpoint = build(tmp_path / "checkpoint")
    none = ["--concurrency"] if load[0] == "--rate" else []
    with serving(MockServer(first_s=0.3, gap_s=0.02)) as mock:
        words = ["run", "--url", mock.url, *WORDS, *none, *load]
        assert main([*words, "--out", str(tmp_path / "own")]) == 0
        out = ["--out", str(tmp_path / "aiperf"), "--generator", "aiperf"]
        assert main([*words, *out, "--checkpoint", str(checkpoint)]) == 0
        theirs = run_aiperf(tmp_path / "aiperf")
    (run,) = Report.load(tmp_path / "own" / "report.json").runs
    ours = run.figures
    assert theirs["time_to_first_token"]["p50"] / 1000 == pytest.approx(
        ours["ttft_s"]["p50"], rel=0.1
    )
    assert theirs["request_throughput"]["avg"] == pytest.approx(ours["requests_per_s"], rel=0.15)
    assert theirs["output_sequence_length"]["avg"] == 5
