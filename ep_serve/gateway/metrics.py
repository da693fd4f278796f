"""Prometheus metrics of the gateway. Label values are bounded: routes, codes, configured names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from collections.abc import Mapping

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000)


class Metrics:
    """All metrics, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "ep_serve_gateway"}
        self.requests = Counter("requests", "Answers by route and code.", ["route", "code"], **own)
        self.seconds = Histogram(
            "request_seconds", "Whole requests.", ["route"], buckets=_SECONDS, **own
        )
        self.first_token = Histogram(
            "time_to_first_token_seconds",
            "From the arrival of a streamed request to its first event.",
            buckets=_SECONDS,
            **own,
        )
        self.token_rate = Histogram(
            "tokens_per_second", "Completion tokens a second of a request.", buckets=_RATES, **own
        )
        self.in_flight = Gauge("in_flight", "Requests that an engine works on.", **own)
        self.queued = Gauge("queued", "Requests that wait for an engine.", **own)
        self.queue_seconds = Histogram(
            "queue_seconds", "Wait for an engine.", buckets=_SECONDS, **own
        )
        self.refused = Counter("refused", "Requests refused by a limit.", ["limit"], **own)
        self.connections_refused = Counter(
            "connections_refused",
            "Connections closed by a limit or for what they sent, by reason.",
            ["reason"],
            **own,
        )
        self.media_bytes = Counter("media_bytes", "Media received.", ["source"], **own)
        self.probe_seconds = Histogram(
            "probe_seconds", "Probing one medium.", buckets=_SECONDS, **own
        )
        self.store_hits = Counter("store_hits", "Media that were stored already.", **own)
        self.store_misses = Counter("store_misses", "Media that were new.", **own)
        self.store_bytes = Gauge("store_bytes", "Media on disk.", **own)
        self.bucket_bytes = Gauge("bucket_bytes", "Files in the bucket.", **own)
        self.store_evicted = Counter("store_evicted", "Media evicted by quota or expiry.", **own)
        self.upstream_up = Gauge(
            "upstream_up", "1 if an engine gets requests.", ["upstream"], **own
        )
        self.upstream_work = Gauge(
            "upstream_requests", "Requests in flight at an engine.", ["upstream"], **own
        )
        self.upstream_failures = Counter(
            "upstream_failures", "Attempts that an engine failed.", ["reason"], **own
        )
        self.quarantined = Counter(
            "quarantined", "Requests that were in flight when two engines failed.", **own
        )
        self.affinity = Counter(
            "affinity",
            "Requests with media, by whether they went to the engine preferred for the medium.",
            ["kept"],
            **own,
        )
        self.tokens = Counter(
            "av_tokens",
            "Audio, video and image tokens before and after the reduction.",
            ["kind"],
            **own,
        )
        self.completion_tokens = Counter("completion_tokens", "Tokens generated.", **own)
        for kind in ("full", "kept", "saved"):
            self.tokens.labels(kind)

    def record_request(self, route: str, status: int, seconds: float) -> None:
        """Record a finished request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def record_usage(self, usage: Mapping[str, Any], seconds: float) -> None:
        """Record the usage that an engine reported for a request that took `seconds`."""
        completion = _number(usage.get("completion_tokens"))
        self.completion_tokens.inc(completion)
        if completion and seconds > 0:
            self.token_rate.observe(completion / seconds)
        reduction = usage.get("reduction")
        if isinstance(reduction, dict):
            full = _number(reduction.get("av_tokens_full"))
            kept = _number(reduction.get("av_tokens_kept"))
            self.tokens.labels("full").inc(full)
            self.tokens.labels("kept").inc(kept)
            self.tokens.labels("saved").inc(max(0, full - kept))


def _number(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
