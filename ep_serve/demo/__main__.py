"""Serve the embedded model, ask about a clip with sound, and print what was answered and saved."""

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
"""How often a question is asked until the blocks it holds are seen, on a machine that is busy."""
TOKENS = 48
"""Made in the first attempt; each later one makes twice as many, and so holds its blocks longer."""
END = "<|im_end|>"
"""What the model ends its answers with."""


@dataclass(frozen=True)
class Row:
    """One answer and what it cost."""

    asked: ClipQuestion
    keep_ratio: float
    answer: str
    usage: dict[str, Any]
    blocks: int
    """Of the KV cache, or 0 if the answer was over before they were seen."""
    first_token_ms: float

    @property
    def verdict(self) -> str:
        """The answer, and whether it is right."""
        return f"{self.answer}: {'right' if self.answer == self.asked.answer else 'wrong'}"


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    clip = FOLDER / "clip.mp4"
    clip.write_bytes(make_clip())
    say(f"Starting the server with the embedded model (log: {FOLDER / 'server.log'}) ...")
    try:
        with ServerProcess(
            MODEL, OPTIONS, log=FOLDER / "server.log", progress=show_seconds
        ) as server:
            say(f"\rServer ready at {server.base_url}          ")
            run(server, clip.read_bytes())
    except ServerError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    say("Server stopped.")
    return 0


def run(server: ServerProcess, clip: bytes) -> None:
    """One streamed answer to read, then tables over keep ratios and over questions."""
    client = OpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    first = QUESTIONS[0]
    say(f"\n> [{FOLDER / 'clip.mp4'}, {SECONDS} s with sound] {first.question}")
    for text in stream(client, clip, first):
        print(text, end="", flush=True)
    say(f"\n(The right answer is: {first.answer}.)\n")
    say(keep_ratios_table([ask(client, server, clip, first, ratio) for ratio in KEEP_RATIOS]))
    least = KEEP_RATIOS[-1]
    say(f"\nThe budget follows the question. The same clip at keep ratio {least:g}:\n")
    say(questions_table([ask(client, server, clip, asked, least) for asked in QUESTIONS]))


def stream(client: OpenAI, clip: bytes, asked: ClipQuestion) -> Any:
    """An answer piece by piece, as any client would ask for it."""
    for chunk in client.chat.completions.create(
        model="demo", messages=messages(clip, asked), max_tokens=16, temperature=0, stream=True
    ):
        yield chunk.choices[0].delta.content or ""


def ask(
    client: OpenAI, server: ServerProcess, clip: bytes, asked: ClipQuestion, keep_ratio: float
) -> Row:
    """Stream one answer and note what it took."""
    for attempt in range(ATTEMPTS):
        unlike = clip + bytes([attempt])
        row = ask_once(client, server, unlike, asked, keep_ratio, TOKENS << attempt)
        if row.blocks:
            break
    return row


def ask_once(
    client: OpenAI,
    server: ServerProcess,
    clip: bytes,
    asked: ClipQuestion,
    keep_ratio: float,
    tokens: int,
) -> Row:
    """Stream one answer of so many tokens and note what it took.

    The model is made to go on behind its answer, so that there is time to read how many blocks its
    prompt holds. Every clip is made a little different, so that no cache shortens the way to the
    first token: bytes after the last box of the file are ignored.
    """
    unlike = clip + keep_ratio.hex().encode() + asked.question.encode()
    began = time.perf_counter()
    chunks = client.chat.completions.create(
        model="demo",
        messages=messages(unlike, asked),
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
        asked, keep_ratio, answer.split(END)[0], usage["reduction"], blocks, 1000 * first_token
    )


def messages(clip: bytes, asked: ClipQuestion) -> Any:
    """The question with the clip in front of it.

    `video_url` is a part that vLLM adds to OpenAI's, so the client's types do not know it.
    """
    url = "data:video/mp4;base64," + base64.b64encode(clip).decode()
    video = {"type": "video_url", "video_url": {"url": url}}
    return [{"role": "user", "content": [video, {"type": "text", "text": asked.question}]}]


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
        f"| {row.asked.question} | {row.verdict} | {kept(row, 'video')} | {kept(row, 'audio')} |"
        for row in rows
    ]
    return "\n".join([head, *lines])


def kept(row: Row, kind: str) -> str:
    return f"{row.usage[kind]['kept']} of {row.usage[kind]['full']}"


def say(text: str) -> None:
    print(text, flush=True)


def show_seconds(seconds: float) -> None:
    if sys.stdout.isatty() or round(2 * seconds) % 20 == 0:
        end = "" if sys.stdout.isatty() else "\n"
        print(f"\r  starting, {seconds:.0f} s", end=end, flush=True)


if __name__ == "__main__":
    sys.exit(main())
