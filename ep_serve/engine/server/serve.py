"""`ep-serve serve`: vLLM's own server, started with this project's defaults.

vLLM's `vllm` command is not used: its CPU build carries another package name and the command fails.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ep_serve.checkpoint.config import REDUCED_ARCHITECTURE
from ep_serve.checkpoint.errors import CheckpointError
from ep_serve.checkpoint.kind import kind_of
from ep_serve.engine.errors import ServeError
from ep_serve.engine.server.loading import exit_on_signal_until_loaded
from ep_serve.engine.settings import ADDITIONAL_CONFIG_KEY

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from pydantic_core import ErrorDetails

SHUTDOWN_SECONDS = 30
"""Running streams have this long to finish after SIGTERM; see `drain.py`."""

GRACE_SECONDS = 5
"""Connections are closed this long after the engine has stopped."""

KEEPALIVE_SECONDS = 60
"""Idle connections stay open this long. With vLLM's 5 s a busy server closes connections on which a
client, or a gateway that keeps them for 3 s, has just sent its next request."""

CPU_KV_CACHE_BYTES = 2 << 30
"""KV cache on a CPU, where vLLM would otherwise take most of the machine's memory."""

PROCESSOR_CACHE_GB = 1
"""vLLM's cache of processed items, in the engine's process. An item of ours holds the question too
where the sieve reads it, so it is worth something to the very same request only; what several
requests share is remembered by content, see `--tower-cache-gib` and `--media-cache-gib`."""

MEDIA_OPTIONS = (
    "keep_ratio",
    "rho_audio",
    "rho_video",
    "fps",
    "min_pixels",
    "max_pixels",
    "max_frames",
    "max_fps",
)
ENGINE_OPTIONS = (
    "sieve",
    "max_full_tokens",
    "tower_cache_gib",
    "media_cache_gib",
    "max_n",
    "step_timeout_s",
)


def serve(arguments: argparse.Namespace, forwarded: Sequence[str]) -> int:
    """Run the server until it receives SIGTERM or SIGINT.

    Args:
        arguments: `checkpoint` and the options that `ep_serve.cli` defines.
        forwarded: options for vLLM.

    Returns:
        The exit code.

    Raises:
        CheckpointError: a checkpoint that cannot be served as asked.
        ServeError: a setting that cannot work.
    """
    from vllm.entrypoints.cli import serve as vllm_serve
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    os.environ.setdefault("VLLM_HTTP_TIMEOUT_KEEP_ALIVE", str(KEEPALIVE_SECONDS))
    parser = make_arg_parser(FlexibleArgumentParser(prog="ep-serve serve", add_help=False))
    args = parser.parse_args([str(arguments.checkpoint), *_defaults(forwarded), *forwarded])
    arguments.sieve, overrides = _route(Path(arguments.checkpoint), arguments.sieve)
    _merge(args, "hf_overrides", overrides)
    _merge(args, "mm_processor_kwargs", _given(arguments, MEDIA_OPTIONS))
    own = _given(arguments, ENGINE_OPTIONS)
    if own:
        given = _json(args.additional_config)
        _merge(
            args,
            "additional_config",
            {ADDITIONAL_CONFIG_KEY: {**given.get(ADDITIONAL_CONFIG_KEY, {}), **own}},
        )
    configure_logging_from_args(args)
    # When the engine has stopped nothing more can come: a client that does not read its last bytes
    # would hold the process for ever, because vLLM leaves uvicorn's own limit unset.
    vllm_serve.run_server = partial(vllm_serve.run_server, timeout_graceful_shutdown=GRACE_SECONDS)
    exit_on_signal_until_loaded(entry)
    command = vllm_serve.ServeSubcommand()
    command.validate(args)
    try:
        command.cmd(args)
    except ValidationError as error:  # of vLLM's configuration, or of what the model asks of it
        raise ServeError("; ".join(_sentence(item) for item in error.errors())) from error
    return 0


def _sentence(error: ErrorDetails) -> str:
    return error["msg"].removeprefix("Value error, ")


def problems(checkpoint: Path) -> list[str]:
    """Faults of a checkpoint directory, found before it is loaded."""
    if not checkpoint.is_dir() or kind_of(checkpoint) != "echoingpixels":
        return []  # a name for vLLM to resolve, or nothing of ours to check
    from ep_serve.checkpoint.check import check

    return [str(finding) for finding in check(checkpoint) if finding.severity == "error"]


def _route(checkpoint: Path, sieve: str | None) -> tuple[str | None, dict[str, Any]]:
    """The sieve of a checkpoint, and what must be overridden in its configuration.

    Raises:
        CheckpointError: a stock checkpoint and no sieve for it.
    """
    if not checkpoint.is_dir():  # a model name, whose kind is not looked up
        foreign = sieve not in (None, "cs2")
        return sieve, {"architectures": [REDUCED_ARCHITECTURE]} if foreign else {}
    kind = kind_of(checkpoint)
    if kind == "echoingpixels":
        return sieve, {}
    sieve = sieve or ("omnisift" if kind == "omnisift" else None)
    if sieve is None or (sieve == "omnisift" and kind != "omnisift"):
        raise CheckpointError(
            "this is a stock Qwen2.5-Omni checkpoint: serve it with --sieve omnizip, uniform, "
            "random or none, or make an EchoingPixels one with `ep-serve checkpoint init`"
        )
    return sieve, {"architectures": [REDUCED_ARCHITECTURE]}


def _defaults(forwarded: Sequence[str]) -> list[str]:
    from vllm import envs
    from vllm.platforms import current_platform

    given = {word.partition("=")[0].replace("_", "-") for word in forwarded}
    defaults = []
    if "--shutdown-timeout" not in given:
        defaults += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    if "--mm-processor-cache-gb" not in given:
        defaults += ["--mm-processor-cache-gb", str(PROCESSOR_CACHE_GB)]
    sized = {"--kv-cache-memory-bytes", "--gpu-memory-utilization"} & given
    if current_platform.is_cpu() and not sized and not envs.VLLM_CPU_KVCACHE_SPACE:
        defaults += ["--kv-cache-memory-bytes", str(CPU_KV_CACHE_BYTES)]
    return defaults


def _given(arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    values = {name: getattr(arguments, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _merge(args: Any, name: str, values: dict[str, Any]) -> None:
    if values:
        setattr(args, name, {**_json(getattr(args, name)), **values})


def _json(value: Any) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(value) if isinstance(value, str) else dict(value or {})
    return parsed
