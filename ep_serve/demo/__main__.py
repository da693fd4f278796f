"""Serve the embedded checkpoint, ask about a clip with sound, and print what was saved."""

from __future__ import annotations

import base64
import re
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from transformers.utils import logging

from ep_serve.checkpoint.embedded import build
from ep_serve.demo.clip import make_clip
from ep_serve.engine.process import ServerError, ServerProcess

FOLDER = Path(".demo")
KEEP_RATIOS = (1.0, 0.2, 0.1, 0.05)
QUESTION = "What is seen and heard in this clip?"
BLOCK_SIZE = 32
"""Tokens in a block of the KV cache, the smallest that vLLM has on a CPU."""
OPTIONS = (
    *("--max-model-len", "8192"),
    *("--block-size", str(BLOCK_SIZE)),
    *("--kv-cache-memory-bytes", str(256 << 20)),
    *("--served-model-name", "demo"),
    "--enforce-eager",  # compiling takes longer than this demo
)


@dataclass(frozen=True)
class Row:
    """What one answer cost."""

    keep_ratio: float
    usage: dict[str, Any]
    blocks: int
    first_token_ms: float


def main() -> int:
    checkpoint = FOLDER / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        logging.set_verbosity_error()  # warnings about the voice that the checkpoint does not have
        say(f"Building the embedded checkpoint in {checkpoint} (random weights) ...")
        build(checkpoint)
    clip = FOLDER / "clip.mp4"
    clip.write_bytes(make_clip())
    say(f"Starting the server (log: {FOLDER / 'server.log'}) ...")
    try:
        with ServerProcess(
            checkpoint, OPTIONS, log=FOLDER / "server.log", progress=show_seconds
        ) as server:
            say(f"\rServer ready at {server.base_url}          ")
            run(server, clip.read_bytes())
    except ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    say("Server stopped.")
    return 0


def run(server: ServerProcess, clip: bytes) -> None:
    """One streamed answer to read, then a table over keep ratios."""
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    say(f"\n> [clip.mp4, 12 s with sound] {QUESTION}")
    ask(client, server, clip, KEEP_RATIOS[1], echo=True)
    say("(The weights are random: the text means nothing, the figures below do.)\n")
    rows = [ask(client, server, clip, ratio) for ratio in KEEP_RATIOS]
    print(table(rows))


def ask(
    client: OpenAI, server: ServerProcess, clip: bytes, keep_ratio: float, echo: bool = False
) -> Row:
    """Stream one answer and note what it took.

    Every clip is made a little different, so that no cache shortens the way to the first token.
    """
    unlike = (
        clip + keep_ratio.hex().encode() + bytes([echo])
    )  # bytes after the last box are ignored
    url = "data:video/mp4;base64," + base64.b64encode(unlike).decode()
    # video_url is a part that vLLM adds to OpenAI's, so the client's types do not know it.
    messages: list[Any] = [
        {
            "role": "user",
            "content": [
                {"type": "video_url", "video_url": {"url": url}},
                {"type": "text", "text": QUESTION},
            ],
        }
    ]
    began = time.perf_counter()
    stream = client.chat.completions.create(
        model="demo",
        messages=messages,
        max_tokens=48,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"keep_ratio": keep_ratio, "ignore_eos": True},
    )
    first_token = 0.0
    blocks = 0
    usage: dict[str, Any] = {}
    for chunk in stream:
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text and not first_token:
            first_token = time.perf_counter() - began
        if text and not blocks:  # the server's gauge follows its first token a moment later
            blocks = blocks_held(server)
        if text and echo:
            print(text, end="", flush=True)
        if chunk.usage is not None:
            usage = chunk.usage.model_dump()
    if echo:
        print()
    return Row(keep_ratio, usage["reduction"], blocks, 1000 * first_token)


def blocks_held(server: ServerProcess) -> int:
    """Blocks of the KV cache in use, from the engine's own figures."""
    url = server.base_url.removesuffix("/v1") + "/metrics"
    with urllib.request.urlopen(url, timeout=10) as response:
        metrics = response.read().decode()
    used = re.search(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", metrics, re.MULTILINE)
    total = re.search(r'num_gpu_blocks="(\d+)"', metrics)
    assert used is not None, "vLLM reports its KV cache"
    assert total is not None, "vLLM reports its KV cache"
    return round(float(used[1]) * (int(total[1]) - 1))


def table(rows: list[Row]) -> str:
    """The figures as a table in Markdown."""
    head = (
        "| keep ratio | prompt tokens full | reduced | video kept | audio kept "
        "| KV blocks held | first token, ms |\n|---:|---:|---:|---:|---:|---:|---:|"
    )
    lines = [
        f"| {row.keep_ratio:g} | {row.usage['prompt_tokens_full']} "
        f"| {row.usage['prompt_tokens_reduced']} "
        f"| {row.usage['video']['kept']} of {row.usage['video']['full']} "
        f"| {row.usage['audio']['kept']} of {row.usage['audio']['full']} "
        f"| {row.blocks} | {row.first_token_ms:.0f} |"
        for row in rows
    ]
    return "\n".join([head, *lines])


def say(text: str) -> None:
    print(text, flush=True)


def show_seconds(seconds: float) -> None:
    if sys.stdout.isatty() or round(2 * seconds) % 20 == 0:
        end = "" if sys.stdout.isatty() else "\n"
        print(f"\r  starting, {seconds:.0f} s", end=end, flush=True)


if __name__ == "__main__":
    sys.exit(main())
