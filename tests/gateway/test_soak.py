"""A small run of `scripts/soak_gateway_store.py`: many uploads, and a kill in the middle."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "soak_gateway_store.py"


@pytest.mark.slow
def test_a_gateway_killed_among_uploads_starts_again_and_stays_within_its_quota() -> None:
    options = ("--uploads", "60", "--quota", str(20 * 2**20), "--kill")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "all listed and readable" in done.stdout
