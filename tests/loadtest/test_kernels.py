from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.kernels import TEXT, shares_table
from loadtest.shapes import EMBEDDED

TOKENS = 64


@pytest.mark.slow
def test_every_stage_is_measured_on_the_machine_at_hand(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, "-m", "loadtest.kernels", "--shapes", "embedded", "--repeats", "1"]
    command += ["--tokens", str(TOKENS), "--matrix", "64", "--json", str(out)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    report = json.loads(out.read_text())
    stages = [row["stage"] for row in report["rows"]]
    prefills = [f"prefill {ratio:g}" for ratio in (1.0, 0.2, 0.1, 0.05)]
    measured = ["refiner", "refiner, mask", "rope, plain", "selection", "gather", *prefills]
    assert [stage for stage in stages if stage != "rope, kernel"] == measured
    assert all(row["ms"] > 0 for row in report["rows"])
    refiner = report["rows"][0]
    full = TOKENS + TEXT
    layers = EMBEDDED.refiner_layers
    operations = EMBEDDED.linear(layers, full) + EMBEDDED.attention(layers, full**2)
    rate = operations / (refiner["ms"] / 1e3) / report["matrix_flops"]
    assert refiner["share"] == pytest.approx(rate)
    assert f"| embedded | {TOKENS} | 0.1 |" in printed


def test_times_are_compared_with_the_full_prefill() -> None:
    times = {
        "refiner": 10.0,
        "selection": 1.0,
        "gather": 1.0,
        "prefill 1": 100.0,
        "prefill 0.2": 20.0,
        "prefill 0.1": 8.0,
        "prefill 0.05": 3.0,
    }
    rows = [{"shape": "3b", "tokens": 4096, "stage": s, "ms": ms} for s, ms in times.items()]
    assert "| 3b | 4096 | 0.1 | 0.100 | 0.020 | 0.080 | 0.200 | 5.00x |" in shares_table(rows)
