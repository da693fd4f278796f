"""A short run of `scripts/flood_gateway.py`: attacks of every kind, and what they cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SLACK_S = 10
"""This machine may be busy: with the attacks, and with other tests."""


@pytest.mark.slow
@pytest.mark.quiet
@pytest.mark.timeout(900)
def test_floods_take_neither_the_gateways_memory_nor_another_tenants_answers() -> None:
    script = [sys.executable, str(ROOT / "scripts" / "flood_gateway.py")]
    options = ["--per-gateway", "16", "--seconds", "1", "--check", "--slack", str(SLACK_S)]
    done = subprocess.run([*script, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
