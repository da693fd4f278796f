"""Benchmark time and memory of every sieve on the CPU, and on a GPU if there is one.

    python scripts/bench_sieves.py [--tokens 1000 4000 16000] [--hidden 3584] [--repeats 2]

Prints a Markdown table: milliseconds to plan (on the CPU, from the layout) and to reduce (median
of the repeats), and the peak memory of a reduction without the pool and the weights. The
states are random, float32 on a CPU and bfloat16 on a GPU; the clip has 144 tokens a second of
picture and 25 of sound. Inputs that other modules compute are not included: CS2's refiner, which is
four decoder layers over the whole prompt, and OmniZip's saliency, which has a row of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ep_serve.layout import Kind, Layout, MediaTokens, Video, build_layout
from ep_serve.sieve import Budget, Pool, get_sieve, known_sieves
from ep_serve.sieve.saliency import windowed_saliency

TOKENS = MediaTokens(
    audio=1, image=2, video=3, audio_bos=4, audio_eos=5, vision_bos=6, vision_eos=7
)
AUDIO_HEADS, AUDIO_HEAD_SIZE, AUDIO_WINDOW = 20, 64, 100
"""Of Qwen2.5-Omni's audio tower, 3B and 7B."""


def main() -> None:
    arguments = parse_arguments()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    print("| device | sieve | AV tokens | kept | plan, ms | reduce, ms | peak memory, MiB |")
    print("|---|---|---|---|---|---|---|")
    for device in map(torch.device, devices):
        for tokens in arguments.tokens:
            layout = clip_of(tokens)
            pool = pool_of(layout, arguments.hidden, device)
            for name in known_sieves():
                bench_sieve(name, layout, pool, arguments.keep_ratio, arguments.repeats)
            bench_saliency(layout, device, arguments.repeats)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time and memory of every sieve.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1_000, 4_000, 16_000])
    parser.add_argument("--hidden", type=int, default=3584, help="width of the decoder")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs of each sieve")
    parser.add_argument("--keep-ratio", type=float, default=0.2)
    return parser.parse_args()


def clip_of(tokens: int) -> Layout:
    """Layout of a prompt with a clip of about `tokens` AV tokens."""
    seconds = max(1, round(tokens / 169))
    clip = Video((seconds, 24, 24), 1.0, audio_tokens=25 * seconds)
    return build_layout([TOKENS.vision_bos, TOKENS.video, TOKENS.vision_eos], [clip], TOKENS)


def pool_of(layout: Layout, hidden_size: int, device: torch.device) -> Pool:
    torch.manual_seed(0)
    return Pool(
        hidden=torch.randn(layout.num_av, hidden_size).to(device, dtype_on(device)),
        kinds=torch.from_numpy(layout.kinds[layout.is_av]).to(device),
        positions=torch.from_numpy(layout.positions[:, layout.is_av]).to(device),
        media=torch.from_numpy(layout.media[layout.is_av]).to(device),
        saliency=torch.rand(layout.count(Kind.AUDIO)).to(device),
    )


def bench_sieve(name: str, layout: Layout, pool: Pool, keep_ratio: float, repeats: int) -> None:
    device = pool.hidden.device
    sieve = get_sieve(name).for_model(pool.hidden.shape[1])
    if isinstance(sieve, nn.Module):
        sieve = sieve.to(device, dtype_on(device))
    plan = sieve.plan(layout, Budget(keep_ratio))
    peak = peak_memory(lambda: sieve.select(pool, plan), device)
    planning = milliseconds(lambda: sieve.plan(layout, Budget(keep_ratio)), device, repeats)
    reducing = milliseconds(lambda: sieve.select(pool, plan), device, repeats)
    print_row(device, name, layout.num_av, str(plan.keep), f"{planning:.2f}", reducing, peak)


def bench_saliency(layout: Layout, device: torch.device, repeats: int) -> None:
    frames = 2 * layout.count(Kind.AUDIO)
    size = (2, AUDIO_HEADS, frames, AUDIO_HEAD_SIZE)
    query, key = torch.randn(size).to(device, dtype_on(device))
    borders = [*range(0, frames, AUDIO_WINDOW), frames]

    def run() -> torch.Tensor:
        return windowed_saliency(query, key, borders, [frames])

    peak = peak_memory(run, device)
    took = milliseconds(run, device, repeats)
    print_row(device, "(omnizip's saliency)", layout.num_av, "", "", took, peak)


def print_row(
    device: torch.device, name: str, size: int, kept: str, planning: str, took: float, peak: int
) -> None:
    cells = [device.type, name, str(size), kept, planning, f"{took:.2f}", f"{peak / 2**20:.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@torch.no_grad()
def milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median duration of a run."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


@torch.no_grad()
def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Peak memory of one run above the memory before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = [event for event in events if event.get("name") == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event["args"]["Ev Idx"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()
