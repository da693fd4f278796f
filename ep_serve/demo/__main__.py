"""Serve the embedded model, request answers about a clip, and print answers and savings."""

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

from ep_serve.demo import MODEL
from ep_serve.demo.clip import QUESTIONS, SECONDS, ClipQuestion, make_clip
from ep_serve.engine.server.process import ServerError, ServerProcess

FOLDER = Path(".demo")
KEEP_RATIOS = (1.0, 0.2, 0.1, 0.05)
BLOCK_SIZE = 32
"""Tokens in a block of the KV cache, the smallest that vLLM has on a CPU."""
OPTIONS = (
    *("--max-model-len", "4096"),
    *("--block-size", str(BLOCK_SIZE)),
    *("--kv-cache-memory-bytes", str(128 << 20)),
    *("--served-model-name", "demo"),
    "--enforce-eager",  # compiling takes longer than this demo
)
ATTEMPTS = 4
"""Tries to read the KV blocks of a request while it runs, on a busy machine."""
TOKENS = 48
"""Tokens generated in the first try; each later one doubles them, to hold its blocks longer."""
END = "<|im_end|>"
"""The model's end token."""


@dataclass(frozen=True)
class Row:
    """One answer and its costs."""

    question: ClipQuestion
    keep_ratio: float
    answer: str
    usage: dict[str, Any]
    blocks: int
    """KV cache blocks, or 0 if the request ended before they were read."""
    first_token_ms: float

    @property
    def verdict(self) -> str:
        """The answer, and whether it is right."""
        return f"{self.answer}: {'right' if self.answer == self.question.answer else 'wrong'}"


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    clip = FOLDER / "clip.mp4"
    clip.write_bytes(make_clip())
    print_line(f"Starting the server with the embedded model (log: {FOLDER / 'server.log'}) ...")
    try:
        with ServerProcess(
            MODEL, OPTIONS, log=FOLDER / "server.log", progress=show_seconds
        ) as server:
            print_line(f"\rServer ready at {server.base_url}          ")
            run(server, clip.read_bytes())
    except ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    print_line("Server stopped.")
    return 0


def run(server: ServerProcess, clip: bytes) -> None:
    """Print one streamed answer, then tables over keep ratios and over questions."""
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    first = QUESTIONS[0]
    print_line(f"\n> [{FOLDER / 'clip.mp4'}, {SECONDS} s with sound] {first.question}")
    for text in stream(client, clip, first):
        print(text, end="", flush=True)
    print_line(f"\n(The right answer is: {first.answer}.)\n")
    print_line(
        keep_ratios_table([measure(client, server, clip, first, ratio) for ratio in KEEP_RATIOS])
    )
    least = KEEP_RATIOS[-1]
    print_line(f"\nThe budget follows the question. The same clip at keep ratio {least:g}:\n")
    print_line(
        questions_table([measure(client, server, clip, question, least) for question in QUESTIONS])
    )


def stream(client: OpenAI, clip: bytes, question: ClipQuestion) -> Any:
    """Stream the text of an answer."""
    for chunk in client.chat.completions.create(
        model="demo", messages=messages(clip, question), max_tokens=16, temperature=0, stream=True
    ):
        yield chunk.choices[0].delta.content or ""


def measure(
    client: OpenAI, server: ServerProcess, clip: bytes, question: ClipQuestion, keep_ratio: float
) -> Row:
    """Stream one answer and note what it took."""
    for attempt in range(ATTEMPTS):
        unique = clip + bytes([attempt])
        row = measure_once(client, server, unique, question, keep_ratio, TOKENS << attempt)
        if row.blocks:
            break
    return row


def measure_once(
    client: OpenAI,
    server: ServerProcess,
    clip: bytes,
    question: ClipQuestion,
    keep_ratio: float,
    tokens: int,
) -> Row:
    """Stream one answer of `tokens` tokens and measure it.

    The model generates beyond its answer, so that there is time to read how many blocks its prompt
    holds. Every clip gets unique bytes after its last box, which decoders ignore, so that no cache
    shortens the time to first token.
    """
    unique = clip + keep_ratio.hex().encode() + question.question.encode()
    began = time.perf_counter()
    chunks = client.chat.completions.create(
        model="demo",
        messages=messages(unique, question),
        max_tokens=tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"keep_ratio": keep_ratio, "ignore_eos": True, "skip_special_tokens": False},
    )
    answer, first_token, blocks = "", 0.0, 0
    usage: dict[str, Any] = {}
    for chunk in chunks:
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text and not first_token:
            first_token = time.perf_counter() - began
        if text and not blocks:  # the server's gauge follows its first token a moment later
            blocks = blocks_held(server)
        answer += text or ""
        if chunk.usage is not None:
            usage = chunk.usage.model_dump()
    return Row(
        question, keep_ratio, answer.split(END)[0], usage["reduction"], blocks, 1000 * first_token
    )


def messages(clip: bytes, question: ClipQuestion) -> Any:
    """The question with the clip in front of it.

    `video_url` is a part that vLLM adds to OpenAI's, so the client's types lack it.
    """
    url = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    video = {"type": "video_url", "video_url": {"url": url}}
    return [{"role": "user", "content": [video, {"type": "text", "text": question.question}]}]


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


def keep_ratios_table(rows: list[Row]) -> str:
    """One question at several keep ratios, in Markdown."""
    head = (
        "| keep ratio | answer | prompt tokens full | reduced | video kept | audio kept "
        "| KV blocks held | first token, ms |\n|---:|---|---:|---:|---:|---:|---:|---:|"
    )
    lines = [
        f"| {row.keep_ratio:g} | {row.verdict} | {row.usage['prompt_tokens_full']} "
        f"| {row.usage['prompt_tokens_reduced']} | {kept(row, 'video')} | {kept(row, 'audio')} "
        f"| {row.blocks or 'not seen'} | {row.first_token_ms:.0f} |"
        for row in rows
    ]
    return "\n".join([head, *lines])


def questions_table(rows: list[Row]) -> str:
    """Several questions at one keep ratio, in Markdown."""
    head = "| question | answer | video kept | audio kept |\n|---|---|---:|---:|"
    lines = [
        f"| {row.question.question} | {row.verdict} | {kept(row, 'video')} | {kept(row, 'audio')} |"
        for row in rows
    ]
    return "\n".join([head, *lines])


def kept(row: Row, kind: str) -> str:
    return f"{row.usage[kind]['kept']} of {row.usage[kind]['full']}"


def print_line(text: str) -> None:
    print(text, flush=True)


def show_seconds(seconds: float) -> None:
    if sys.stdout.isatty() or round(2 * seconds) % 20 == 0:
        end = "" if sys.stdout.isatty() else "\n"
        print(f"\r  starting, {seconds:.0f} s", end=end, flush=True)


if __name__ == "__main__":
    sys.exit(main())
