"""Compute the figures of a run.

- TTFT: from sending a request to its first non-empty token.
- ITL: the time between two chunks with text of one answer; over all answers.
- TPOT: (last token - first token) / (tokens - 1) of one answer.
- E2E: from sending a request to its last token.
- Goodput: completed requests a second within the service level.

Latencies are those of complete answers. Errors and incomplete answers are counted separately and
never meet the service level; requests cut off by the end of a run are excluded.
Percentiles interpolate linearly.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from loadtest.monitor import LOOP_DELAY_METRIC
from loadtest.records import Answer, Novelty, Run, Sample

PERCENTILES = (50, 90, 95, 99)
NOVELTIES: tuple[Novelty, ...] = ("new", "known clip", "repeated")
WORKER_STAGES = ("towers", "refiner", "selection")


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """Latency limits in seconds, and the share of requests that must meet them."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None
    attain: float = 0.9
    """Minimum share of requests within the limits for a load to pass."""

    @property
    def is_set(self) -> bool:
        return any(limit is not None for limit in (self.ttft_s, self.tpot_s, self.e2e_s))

    def is_good(self, answer: Answer) -> bool:
        """Whether an answer is complete and within every limit."""
        if answer.status != "ok":
            return False
        pairs = (
            (answer.ttft_s, self.ttft_s),
            (answer.tpot_s, self.tpot_s),
            (answer.e2e_s, self.e2e_s),
        )
        return all(limit is None or value is None or value <= limit for value, limit in pairs)

    def attained(self, answers: Iterable[Answer]) -> float:
        """Share of the requests within the limits, without those cut off."""
        counted = [answer for answer in answers if answer.status != "cut"]
        return sum(map(self.is_good, counted)) / len(counted) if counted else 0.0


def summarize(values: Sequence[float]) -> dict[str, float] | None:
    """Count, mean, minimum, maximum and percentiles; None if empty."""
    if not values:
        return None
    array = np.asarray(values, dtype=float)
    points = np.percentile(array, PERCENTILES)
    return {
        "count": len(values),
        "mean": float(array.mean()),
        "min": float(array.min()),
        "max": float(array.max()),
        **{f"p{p}": float(v) for p, v in zip(PERCENTILES, points, strict=True)},
    }


def figures(run: Run, level: ServiceLevel) -> dict[str, Any]:
    """Every figure of a run."""
    whole = [answer for answer in run.answers if answer.status == "ok"]
    wall = run.wall_s or float("nan")
    good = sum(level.is_good(answer) for answer in run.answers)
    tokens = sum(answer.output_tokens for answer in whole)
    errors = Counter(answer.error for answer in run.answers if answer.status == "error")
    lateness = [a.sent_s - a.scheduled_s for a in run.answers if a.scheduled_s is not None]
    return {
        **latencies(whole),
        "requests": len(run.answers),
        "whole": len(whole),
        "errors": dict(errors),
        "incomplete": sum(answer.status == "incomplete" for answer in run.answers),
        "cut": sum(answer.status == "cut" for answer in run.answers),
        "requests_per_s": len(whole) / wall,
        "output_tokens_per_s": tokens / wall,
        "prompt_tokens_per_s": sum(answer.prompt_tokens for answer in whole) / wall,
        "goodput_per_s": good / wall if level.is_set else None,
        "attained": level.attained(run.answers) if level.is_set else None,
        "prompt_tokens": _mean([answer.prompt_tokens for answer in whole]),
        "latest_start_s": max(lateness, default=None),
        "by_novelty": {
            novelty: latencies([a for a in whole if a.novelty == novelty])
            for novelty in NOVELTIES
            if any(answer.novelty == novelty for answer in whole)
        },
        "server": server(run),
        "stages_s": stages(run, whole),
    }


def latencies(answers: Sequence[Answer]) -> dict[str, dict[str, float] | None]:
    """TTFT, ITL, TPOT and E2E in seconds."""
    return {
        "ttft_s": summarize([a.ttft_s for a in answers if a.ttft_s is not None]),
        "itl_s": summarize([gap for answer in answers for gap in answer.gaps_s]),
        "tpot_s": summarize([a.tpot_s for a in answers if a.tpot_s is not None]),
        "e2e_s": summarize([a.e2e_s for a in answers if a.e2e_s is not None]),
    }


def server(run: Run) -> dict[str, float | None]:
    """Figures from the server's metrics."""
    use = [sample.kv_use for sample in run.samples if sample.kv_use is not None]
    running = _present(run.samples, "running")
    each = _blocks_per_request(run)
    return {
        "kv_use_peak": max(use, default=None),
        "kv_use_mean": _mean(use),
        "kv_blocks_peak": max(use) * run.kv_blocks if use and run.kv_blocks else None,
        "kv_blocks_per_request": each,
        "kv_blocks_exact": _blocks_needed(run),
        "requests_that_fit": run.kv_blocks // each if each and run.kv_blocks else None,
        "running_peak": max(running, default=None),
        "waiting_peak": max(_present(run.samples, "waiting"), default=None),
        "preemptions": _counter(run, "vllm:num_preemptions_total"),
        "prefix_cache_hit_share": _share(run, "vllm:prefix_cache"),
        "tower_cache_hits": _counter(run, "ep_serve_tower_cache_hits_total"),
        "tower_cache_misses": _counter(run, "ep_serve_tower_cache_misses_total"),
        "media_cache_hits": _counter(run, "ep_serve_media_cache_hits_total"),
        "media_cache_misses": _counter(run, "ep_serve_media_cache_misses_total"),
        "tower_cache_bytes_peak": max(_present(run.samples, "tower_cache_bytes"), default=None),
        "event_loop_late_share": _loop_delay_share(run),
        "memory_bytes_peak": max(_present(run.samples, "memory_bytes"), default=None),
        "memory_bytes_mean": _mean(_present(run.samples, "memory_bytes")),
    }


def _blocks_per_request(run: Run) -> float | None:
    """Maximum of blocks in use per running request."""
    shares = [
        sample.kv_use * run.kv_blocks / sample.running
        for sample in run.samples
        if sample.kv_use and sample.running and run.kv_blocks
    ]
    return max(shares, default=None)


def _blocks_needed(run: Run) -> int | None:
    """Blocks that the longest answered request fills; its last token is never stored."""
    stored = [a.prompt_tokens + a.output_tokens - 1 for a in run.answers if a.status == "ok"]
    return -(-max(stored) // run.block_size) if stored and run.block_size else None


def stages(run: Run, whole: Sequence[Answer]) -> dict[str, float]:
    """Mean seconds of a request by stage.

    vLLM's prefill time is from scheduling to the first token; towers, refiner and selection run
    inside it, and include waiting for other requests of a batch. The rest before the queue is
    upload, download, decoding, the processor, and the transfer to the engine, as far as the server
    does not report them.
    """
    count = len(whole)
    if not count:
        return {}
    measured = {
        name: _counter(run, f'ep_serve_stage_seconds_total{{stage="{name}"}}') / count
        for name in _stage_names(run)
    }
    queue = _counter(run, "vllm:request_queue_time_seconds_sum") / count
    prefill = _counter(run, "vllm:request_prefill_time_seconds_sum") / count
    first = float(np.mean([a.ttft_s for a in whole if a.ttft_s is not None]))
    last = float(np.mean([a.e2e_s for a in whole if a.e2e_s is not None]))
    worker = {name: value for name, value in measured.items() if name in WORKER_STAGES}
    before = {name: value for name, value in measured.items() if name not in WORKER_STAGES}
    if not prefill:
        return {"until first token": first, "generation": last - first}
    return {
        **before,
        "before the queue" if not before else "rest before the queue": max(
            0.0, first - queue - prefill - sum(before.values())
        ),
        "queue": queue,
        **worker,
        "prefill": max(0.0, prefill - sum(worker.values())),
        "generation": last - first,
    }


def _stage_names(run: Run) -> list[str]:
    start = 'ep_serve_stage_seconds_total{stage="'
    return [name[len(start) : -2] for name in run.counters if name.startswith(start)]


def _counter(run: Run, name: str) -> float:
    return run.counters.get(name, 0.0)


def _share(run: Run, name: str) -> float | None:
    queries = _counter(run, f"{name}_queries_total")
    return _counter(run, f"{name}_hits_total") / queries if queries else None


def _loop_delay_share(run: Run) -> float | None:
    """Share of event loop delays of the API process over 50 ms."""
    count = _counter(run, f"{LOOP_DELAY_METRIC}_count")
    in_time = _counter(run, f'{LOOP_DELAY_METRIC}_bucket{{le="0.05"}}')
    return 1 - in_time / count if count else None


def _present(samples: Sequence[Sample], name: str) -> list[float]:
    values = (getattr(sample, name) for sample in samples)
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
