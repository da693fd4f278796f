"""Write the requests for AIPerf, for loads beyond one driver process.

AIPerf (github.com/ai-dynamo/aiperf, 0.13) sends complete bodies as they are: its `raw_payload`
data set, one JSON object on a line. It needs its own environment, without the Hugging Face
offline variables of the servers.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from loadtest.records import Load
from loadtest.scenario import Request


def write_payloads(path: Path, requests: Iterable[Request]) -> int:
    """Write one body on a line; returns how many."""
    count = 0
    with path.open("wb") as file:
        for request in requests:
            file.write(request.body + b"\n")
            count += 1
    return count


def command(
    payloads: Path,
    url: str,
    model: str,
    load: Load,
    count: int,
    seed: int,
    artifacts: Path,
    tokenizer: Path | None = None,
) -> str:
    """The command line that sends them in order at this load.

    AIPerf requires a tokenizer even if the server counts tokens; its `builtin` one is downloaded,
    so without a network pass the folder of one.
    """
    options = [
        *("--model", model),
        *("--url", url.removesuffix("/v1")),
        *("--endpoint-type", "chat"),
        "--streaming",
        *("--input-file", str(payloads)),
        *("--custom-dataset-type", "raw_payload"),
        *("--dataset-sampling-strategy", "sequential"),
        *("--request-count", str(count)),
        *("--random-seed", str(seed)),
        "--use-server-token-count",
        *("--tokenizer", str(tokenizer or "builtin")),
        *("--output-artifact-dir", str(artifacts)),
        *_load_options(load),
    ]
    unset = ["env", "-u", "HF_HUB_OFFLINE", "-u", "TRANSFORMERS_OFFLINE"]
    return shlex.join([*unset, "aiperf", "profile", *options])


def _load_options(load: Load) -> list[str]:
    if load.kind == "closed":
        return ["--concurrency", f"{load.value:g}"]
    options = ["--request-rate", f"{load.value:g}", "--arrival-pattern", load.kind]
    if load.kind == "gamma":
        options += ["--arrival-smoothness", f"{load.burstiness:g}"]
    return options
