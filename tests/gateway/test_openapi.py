"""The OpenAPI document, and what a fuzzer that believes it finds."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ep_serve.gateway.api.app import create_app
from tests.gateway.conftest import MakeWorld
from tests.gateway.mock_upstream import MODEL

pytestmark = pytest.mark.anyio

EXAMPLES = 20
"""Of each operation and phase; about ten seconds on an idle machine."""
CONFIG = """
[checks]
# A schema cannot say what makes a medium whole, or that one number must fit another.
positive_data_acceptance.enabled = false

[[operations]]
include-name = "POST /v1/files"
# The fields of a form are texts: a purpose of true is the purpose "true".
checks.negative_data_rejection.enabled = false
"""


async def test_schemathesis_finds_no_fault(world: MakeWorld, tmp_path: Path) -> None:
    # What a URL names is for the table of hostile requests; here it would only take time.
    async with world(media={"fetch": {"enabled": False}}) as w:
        document = create_app(w.gateway).openapi()
        chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
        # Of a model that nobody serves an engine would never hear.
        chat["application/json"]["schema"]["properties"]["model"] = {"const": MODEL}
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        (tmp_path / "schemathesis.toml").write_text(CONFIG)
        code, output = await schemathesis(tmp_path, f"http://127.0.0.1:{w.now.port}")
        assert code == 0, output
        assert "10 selected / 10 total" in output
        assert len(w.engine.requests) > EXAMPLES
        assert not answers_5xx(w.gateway.metrics.registry)


async def schemathesis(folder: Path, url: str) -> tuple[int, str]:
    """Run it over `openapi.json` in a folder, the same way every time; exit code and report."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", url),
        *("--generation-deterministic", "--max-examples", str(EXAMPLES), "--no-color"),
        # A slow machine is no fault of the gateway's.
        *("--suppress-health-check", "all", "--warnings", "off"),
        cwd=folder,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


def answers_5xx(registry: Any) -> dict[str, float]:
    """The routes that answered with 5xx, and how often."""
    return {
        f"{sample.labels['route']} {sample.labels['code']}": sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if sample.name == "ep_serve_gateway_requests_total"
        and sample.labels["code"].startswith("5")
    }
