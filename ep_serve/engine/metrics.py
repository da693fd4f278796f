"""Prometheus series of this project, beside vLLM's own on `/metrics`.

Counters end in `_total`, durations are seconds, sizes are bytes; labels are bounded (modality,
stage, kind of file).
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Literal

from prometheus_client import Counter, Gauge, Histogram

from ep_serve.engine.outcomes import WORKER_STAGES
from ep_serve.media import decodes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ep_serve.engine.outcomes import Work

DECODE_KINDS: tuple[Literal["video", "audio", "image"], ...] = ("video", "audio", "image")
Stage = Literal["fetch", "decode", "features", "layout", "item"]
STAGES: tuple[Stage, ...] = ("fetch", "decode", "features", "layout", "item")
"""Stages of a request in the API process, in order; the worker's stages follow."""

LATE_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
KEEP_RATIO_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1.0)


class Metrics:
    """All series; one instance a process, see `metrics`."""

    def __init__(self) -> None:
        self.full = Counter(
            "ep_serve_av_tokens_full", "AV tokens that entered the sieve.", ["modality"]
        )
        self.kept = Counter(
            "ep_serve_av_tokens_kept", "AV tokens that the sieve kept.", ["modality"]
        )
        self.saved = Counter(
            "ep_serve_kv_tokens_saved",
            "Prompt tokens that requests did not bring into the KV cache.",
        )
        self.keep_ratio = Histogram(
            "ep_serve_request_keep_ratio",
            "Keep ratio of requests with media.",
            buckets=KEEP_RATIO_BUCKETS,
        )
        self.stage_seconds = Counter(
            "ep_serve_stage_seconds", "Time spent on requests with media.", ["stage"]
        )
        self.loop_late = Histogram(
            "ep_serve_event_loop_late_seconds",
            "Event loop lag of the API process.",
            buckets=LATE_BUCKETS,
        )
        self.tower_hits = Counter(
            "ep_serve_tower_cache_hits", "Tower outputs found in the worker's memory."
        )
        self.tower_misses = Counter(
            "ep_serve_tower_cache_misses", "Tower outputs that had to be computed."
        )
        self.tower_bytes = Gauge(
            "ep_serve_tower_cache_bytes",
            "Tower outputs held by the worker.",
            multiprocess_mode="sum",
        )
        self.decodes = Counter(
            "ep_serve_media_decodes", "Files decoded in the API process.", ["kind"]
        )
        self.media_hits = Counter("ep_serve_media_cache_hits", "Media whose features were cached.")
        self.media_misses = Counter(
            "ep_serve_media_cache_misses", "Media that had to be processed."
        )
        for kind in DECODE_KINDS:
            for series in (self.full, self.kept, self.decodes):
                series.labels(kind)
        for stage in (*STAGES, *WORKER_STAGES):
            self.stage_seconds.labels(stage)
        self._seen: dict[tuple[str, str], float] = {}

    @contextmanager
    def timed(self, stage: Stage) -> Iterator[None]:
        """Add the time spent inside to a stage, whether it goes well or not."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stage_seconds.labels(stage).inc(time.perf_counter() - began)

    def request(self, keep_ratio: float, saved_tokens: int) -> None:
        """Count one request with media, as it is admitted."""
        self.saved.inc(saved_tokens)
        self.keep_ratio.observe(keep_ratio)

    def worker(self, work: Work) -> None:
        """Count a worker's work since its last report."""
        for series, counts in ((self.full, work["full"]), (self.kept, work["kept"])):
            for modality, count in counts.items():
                series.labels(modality).inc(count)
        for stage, seconds in work["stage_seconds"].items():
            self.stage_seconds.labels(stage).inc(seconds)
        self.tower_hits.inc(work["tower_hits"])
        self.tower_misses.inc(work["tower_misses"])
        self.tower_bytes.inc(work["tower_cache_bytes"])

    def media(self, hits: int, misses: int) -> None:
        """Advance the counters of media to the totals of this process."""
        for kind in DECODE_KINDS:
            self._advance(self.decodes.labels(kind), "decodes", kind, decodes.value(kind))
        self._advance(self.media_hits, "media_hits", "", hits)
        self._advance(self.media_misses, "media_misses", "", misses)

    def _advance(self, counter: Counter, name: str, label: str, total: float) -> None:
        before = self._seen.get((name, label), 0)
        if total > before:
            counter.inc(total - before)
            self._seen[(name, label)] = total


@cache
def metrics() -> Metrics:
    """The series of this process."""
    return Metrics()
