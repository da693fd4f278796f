"""Encode in one engine, decode in another: `python -m tests.deploy.try_encoder`.

The reduced prompt of a clip, with its positions, is what vLLM's encoder cache holds, and an encoder
cache connector brings it from engine to engine. Three engines run one after the other here, with
the embedded checkpoint's shape and vLLM's example connector, which leaves its items in a folder:
one alone, one that encodes and leaves what it encoded, and one that may only find it. All have to
answer the same, and the last one must not have computed anything of the clip itself.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ep_serve.checkpoint.embedded import build
from ep_serve.engine.server.process import ServerProcess
from tests.deploy.test_schemas import load_program

OPTIONS = (
    *("--served-model-name", "demo"),
    *("--max-model-len", "2048"),
    *("--kv-cache-memory-bytes", str(64 << 20)),
    "--enforce-eager",
)
STAGES = re.compile(
    r'^ep_serve_stage_seconds_total\{stage="(towers|refiner|selection)"\} (\S+)$', re.MULTILINE
)
"""What the worker computes; the API process of every engine still decodes the clip."""


@dataclass(frozen=True)
class Answer:
    """What an engine said, what it says it kept, and how many seconds its worker computed."""

    text: str
    logprobs: list[float]
    reduction: dict[str, Any]
    stages: dict[str, float]


def main() -> int:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        build(folder / "checkpoint")
        alone = ask(folder, "alone")
        encoder = ask(folder, "encoder", "ec_both")
        decoder = ask(folder, "decoder", "ec_consumer")
        (item,) = (folder / "items").glob("*/*")
        print(f"one item of {item.stat().st_size} bytes")
    for name, answer in (("alone", alone), ("encoder", encoder), ("decoder", decoder)):
        print(f"{name}: {answer.text!r}, {answer.stages}, {answer.reduction}")
    same = alone.text == encoder.text == decoder.text
    nearest = max(abs(a - b) for a, b in zip(alone.logprobs, decoder.logprobs, strict=True))
    print(f"same answers: {same}; log-probabilities differ by {nearest:g} at most")
    return int(not same or sum(decoder.stages.values()) > 0)


def ask(folder: Path, name: str, role: str = "") -> Answer:
    """Start an engine, ask it about the clip, and stop it."""
    connector = {
        "ec_connector": "ECExampleConnector",
        "ec_role": role,
        "ec_connector_extra_config": {"shared_storage_path": str(folder / "items")},
    }
    options = [*OPTIONS, *(("--ec-transfer-config", json.dumps(connector)) if role else ())]
    question = load_program("ep-serve/files/try_gateway").question("demo")
    body = {**question, "logprobs": True, "ignore_eos": True}
    with ServerProcess(folder / "checkpoint", options, log=folder / f"{name}.log") as server:
        request = urllib.request.Request(
            f"{server.base_url}/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=300) as reply:
            answer = json.load(reply)
        with urllib.request.urlopen(server.base_url.replace("/v1", "/metrics")) as reply:
            stages = STAGES.findall(reply.read().decode())
    (choice,) = answer["choices"]
    return Answer(
        choice["message"]["content"],
        [token["logprob"] for token in choice["logprobs"]["content"]],
        answer["usage"]["reduction"],
        {stage: float(seconds) for stage, seconds in stages},
    )


if __name__ == "__main__":
    sys.exit(main())
