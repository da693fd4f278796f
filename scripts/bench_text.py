"""Compare text-only throughput with stock vLLM on the same decoder.

    python scripts/bench_text.py [--rounds 5]

Makes a checkpoint of random weights in two forms, one for stock vLLM (no refiner, no score head)
and one for ours, and lets both answer the same text prompts in turns, so that whatever else the
machine does falls on both. Prints tokens a second of each round and the ratio of the medians. The
model is tiny, so the ratio shows the work around the model at its largest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers.utils import logging

from ep_serve.checkpoint.embedded import build

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.engine.checkpoints import make_stock

PROMPTS = 16
PROMPT_TOKENS = 256
NEW_TOKENS = 128

WORKER = f"""
import sys, time
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], max_model_len=1024, max_num_seqs={PROMPTS}, disable_log_stats=True,
          kv_cache_memory_bytes=256 << 20, enable_prefix_caching=False)
prompts = [dict(prompt_token_ids=[(i * 7 + j) % 200 + 30 for j in range({PROMPT_TOKENS})])
           for i in range({PROMPTS})]
params = SamplingParams(max_tokens={NEW_TOKENS}, temperature=0, ignore_eos=True)
llm.generate(prompts, params, use_tqdm=False)
print("ready", flush=True)
for line in sys.stdin:
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    print("seconds", time.perf_counter() - began, flush=True)
"""


class Engine:
    """An engine in a subprocess that runs the prompts on request."""

    def __init__(self, checkpoint: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(checkpoint)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        )
        self._line_with("ready")

    def _line_with(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line
        raise SystemExit("the engine ended; run it by hand to see why")

    def tokens_per_second(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        seconds = float(self._line_with("seconds").split()[1])
        return PROMPTS * (PROMPT_TOKENS + NEW_TOKENS) / seconds

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    logging.set_verbosity_error()  # warnings about the missing speech output
    with tempfile.TemporaryDirectory() as folder:
        ours = build(Path(folder) / "ours")
        engines = {"stock": Engine(make_stock(ours, Path(folder) / "stock")), "ours": Engine(ours)}
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(rounds):
            order = list(engines) if turn % 2 == 0 else list(engines)[::-1]
            for name in order:
                rates[name].append(engines[name].tokens_per_second())
            print(f"round {turn + 1}: stock {rates['stock'][-1]:.0f}, ours {rates['ours'][-1]:.0f}")
        for engine in engines.values():
            engine.close()
    ratio = statistics.median(rates["ours"]) / statistics.median(rates["stock"])
    print(f"tokens a second, ours / stock: {ratio:.3f} (median of {rounds} rounds)")


if __name__ == "__main__":
    main()
