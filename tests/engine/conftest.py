"""Servers shared by the tests of this folder: each starts once, when a test first asks for it.

Those that one module needs end with it, so that few are alive at a time: each takes gigabytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ep_serve.demo import MODEL
from ep_serve.engine.server.process import ServerProcess
from tests.engine.client import Client
from tests.goldens import CHECKPOINT

PIXELS = ("--min-pixels", "3136", "--max-pixels", "200704")
"""The pixel limits that the goldens were made with."""

EXACT = ("--dtype", "float32", "--enforce-eager")


@contextmanager
def serving(
    factory: pytest.TempPathFactory,
    *options: str,
    environment: dict[str, str] | None = None,
    checkpoint: Path = CHECKPOINT,
) -> Iterator[Client]:
    """A server on the goldens' checkpoint, or another, and a client for it."""
    if not checkpoint.is_dir():
        pytest.skip(f"the reference numbers are not at {CHECKPOINT.parent}")
    log = factory.mktemp("server") / "log"
    with ServerProcess(
        checkpoint,
        [*PIXELS, *EXACT, "--served-model-name", "golden", *options],
        log=log,
        environment={"HF_HUB_OFFLINE": "1", **(environment or {})},
    ) as process:
        yield Client(process)


MEMORY_GIB = {"decode_memory_gib": 1.0, "media_cache_gib": 0.125, "request_memory_gib": 0.5}
"""Of the API process of the plain server."""

PLAIN = (
    *("--additional-config", json.dumps({"ep_serve": MEMORY_GIB})),
    *("--max-model-len", "2048"),
    *("--max-full-tokens", "6000"),
    *("--block-size", "32"),
    *("--kv-cache-memory-bytes", str(256 << 20)),
    *("--limit-mm-per-prompt", '{"video": 2, "audio": 2, "image": 2}'),
    *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    # Random weights would fill a JSON answer with white space up to its limit.
    *("--structured-outputs-config", '{"backend": "xgrammar", "disable_any_whitespace": true}'),
    "--enable-prompt-tokens-details",
)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The plain server: prompts in one piece, room for many requests."""
    with serving(tmp_path_factory, *PLAIN) as client:
        yield client


@pytest.fixture(scope="module")
def any_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Client]:
    """The plain server, on the embedded model where the goldens' checkpoint is absent."""
    if CHECKPOINT.is_dir():
        yield request.getfixturevalue("server")
    else:
        with serving(tmp_path_factory, *PLAIN, checkpoint=MODEL) as client:
            yield client


@pytest.fixture(scope="module")
def cramped_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """A server without room: chunks of 48 tokens, a KV cache for few requests, short sequences."""
    with serving(
        tmp_path_factory,
        *("--max-model-len", "192"),
        *("--max-full-tokens", "6000"),
        *("--block-size", "32"),
        *("--num-gpu-blocks-override", "13"),
        *("--max-num-batched-tokens", "48"),
        *("--max-num-seqs", "16"),
        *("--mm-processor-cache-type", "shm"),
        "--enable-prompt-tokens-details",
    ) as client:
        yield client
