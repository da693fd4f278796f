"""Targets of a load test: a server and the fields of its requests.

Targets are named:

- `stock`: vLLM without the plugin, all tokens, a clip's sound on, on the stock twin
- `none`: this engine without reduction (`--sieve none`), on the stock twin
- `0.2`: this engine with the checkpoint's own sieve and this keep ratio
- `omnizip@0.35`: this engine with another sieve, on the stock twin
- `plain`: requests without any option of ours, for a remote server
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from ep_serve.engine.server.process import ServerProcess

MODEL = "loadtest"
ROOT = Path(__file__).resolve().parents[1]
OWN_SIEVE = "ours"
MAX_FRAMES = 768
"""This engine's default maximum frames of a clip, also set for stock vLLM."""

ServerKind = Literal["stock", "engine", "remote"]


@dataclass(frozen=True)
class Target:
    """A server and its request fields.

    Attributes:
        name: as given.
        server: targets of the same server name share a server.
        sieve: for an engine; None for the checkpoint's own.
        fields: of every request.
        keep_ratio: of the requests; 1 without reduction, None for the server's default.
    """

    name: str
    kind: ServerKind
    server: str
    sieve: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    keep_ratio: float | None = None

    @property
    def is_reducing(self) -> bool:
        return self.kind != "stock" and self.name not in ("none", "plain")

    @classmethod
    def parse(cls, name: str, *, remote: bool = False) -> Self:
        """Parse a target name.

        Raises:
            ValueError: the name is invalid, or needs a server to start and `remote` is set.
        """
        if remote:
            if name == "plain":
                return cls(name, "remote", "remote")
            ratio = _ratio(name)
            return cls(name, "remote", "remote", None, {"keep_ratio": ratio}, ratio)
        if name == "stock":
            sound = {"mm_processor_kwargs": {"use_audio_in_video": True}}
            return cls(name, "stock", "stock", None, sound, 1.0)
        if name == "none":
            return cls(name, "engine", "none", "none", {}, 1.0)
        sieve, at, rest = name.rpartition("@")
        ratio = _ratio(rest)
        server = sieve if at else OWN_SIEVE
        return cls(name, "engine", server, sieve or None, {"keep_ratio": ratio}, ratio)


def _ratio(word: str) -> float:
    try:
        ratio = float(word)
    except ValueError:
        raise ValueError(f"{word!r} is neither a target nor a keep ratio") from None
    if not 0 < ratio <= 1:
        raise ValueError(f"a keep ratio must be above 0 and at most 1, got {word}")
    return ratio


@dataclass(frozen=True)
class ServerSettings:
    """Common settings of the servers of a comparison.

    Attributes:
        ours: checkpoint with refiner and score head.
        stock: the same without them.
        max_model_len: tokens; must hold an unreduced prompt and its answer.
        kv_bytes: size of the KV cache.
        block_size: tokens in one block of it.
        min_pixels: smaller frames are enlarged to it; None for the processor's default.
        extra: options for every server.
    """

    ours: Path
    stock: Path
    max_model_len: int
    kv_bytes: int = 2 << 30
    block_size: int = 32
    min_pixels: int | None = None
    extra: tuple[str, ...] = ()

    def options(self, target: Target) -> list[str]:
        """The command line of a target's server, after its checkpoint."""
        options = [
            *("--served-model-name", MODEL),
            *("--max-model-len", str(self.max_model_len)),
            *("--kv-cache-memory-bytes", str(self.kv_bytes)),
            *("--block-size", str(self.block_size)),
            # Stock vLLM refuses a video of more tokens than it computes in a step.
            *("--max-num-batched-tokens", str(self.max_model_len)),
            *("--limit-mm-per-prompt", '{"video": 1, "audio": 1, "image": 0}'),
            "--enable-prompt-tokens-details",
        ]
        if target.kind == "stock":
            # Two frames a second as in this engine; vLLM's default is 32 frames a clip.
            frames = {"video": {"fps": 2, "num_frames": MAX_FRAMES}}
            options += ["--media-io-kwargs", json.dumps(frames)]
            options += ["--trust-request-mm-kwargs", "--skip-mm-profiling"]
            if self.min_pixels is not None:
                options += ["--mm-processor-kwargs", json.dumps({"min_pixels": self.min_pixels})]
        else:
            if self.min_pixels is not None:
                options += ["--min-pixels", str(self.min_pixels)]
            if target.sieve is not None:
                options += ["--sieve", target.sieve]
                if target.is_reducing:  # some sieves do not start without a default
                    options += ["--keep-ratio", str(target.keep_ratio)]
        return [*options, *self.extra]

    def checkpoint(self, target: Target) -> Path:
        own = target.kind == "engine" and target.sieve is None
        return self.ours if own else self.stock

    def module(self, target: Target) -> tuple[str, ...]:
        if target.kind == "stock":
            return ("-m", "loadtest.stock_server")
        return ("-m", "ep_serve", "serve")

    def command(self, target: Target) -> str:
        """The command line, without host and port."""
        words = ["python", *self.module(target), str(self.checkpoint(target))]
        return shlex.join([*words, *self.options(target)])


@dataclass(frozen=True)
class RunningServer:
    """A server that is ready.

    Attributes:
        url: of the API, with `/v1`.
        model: served model name.
        pid: of its main process, if it runs on this machine.
        start_s: from starting it until it was healthy.
    """

    url: str
    model: str
    pid: int | None = None
    start_s: float | None = None
    command: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def chat_url(self) -> str:
        return f"{self.url}/chat/completions"

    @property
    def metrics_url(self) -> str:
        return self.url.removesuffix("/v1") + "/metrics"


def start_servers(
    stack: ExitStack,
    targets: Sequence[Target],
    settings: ServerSettings,
    logs: Path,
    progress: Callable[[str], None],
) -> dict[str, RunningServer]:
    """Start the servers of `targets`, one after the other; they stop when `stack` closes.

    Args:
        stack: owns the servers.
        targets: whose servers are started, each once.
        settings: for all of them.
        logs: folder for what they print.
        progress: called with status texts.

    Raises:
        ServerError: one did not start.
    """
    servers: dict[str, RunningServer] = {}
    for target in targets:
        if target.server in servers:
            continue
        waited = 0.0

        def note(seconds: float, name: str = target.server) -> None:
            nonlocal waited
            waited = seconds
            progress(f"starting {name}, {seconds:.0f} s")

        process = stack.enter_context(
            ServerProcess(
                settings.checkpoint(target),
                settings.options(target),
                log=logs / f"{target.server}.log",
                module=settings.module(target),
                environment={"PYTHONPATH": _python_path(), "HF_HUB_OFFLINE": "1"},
                progress=note,
            )
        )
        servers[target.server] = RunningServer(
            process.base_url, MODEL, process.pid, waited, settings.command(target)
        )
    return servers


def _python_path() -> str:
    """PYTHONPATH of the servers, which must find this package."""
    return ":".join(dict.fromkeys([str(ROOT), *(path for path in sys.path if path)]))
