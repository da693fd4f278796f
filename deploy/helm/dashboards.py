"""Generate the Grafana dashboards: `python deploy/helm/dashboards.py`.

A panel is a title, a unit and queries with their legends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "ep-serve" / "files" / "dashboards"
PODS = 'namespace="$namespace"'
RATE = "$__rate_interval"
COLUMNS = 24
WIDTH = 8
HEIGHT = 8


@dataclass(frozen=True)
class Panel:
    """One graph: queries by legend."""

    title: str
    unit: str
    queries: dict[str, str]
    note: str = ""


def per_second(name: str, by: str = "", selector: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({name}{{{PODS}{selector}}}[{RATE}]))"


def quantile(share: float, name: str, by: str = "") -> str:
    grouped = f"le, {by}" if by else "le"
    rate = f"rate({name}_bucket{{{PODS}}}[{RATE}])"
    return f"histogram_quantile({share}, sum by ({grouped}) ({rate}))"


def percentiles(name: str) -> dict[str, str]:
    return {f"p{round(100 * share)}": quantile(share, name) for share in (0.5, 0.9, 0.99)}


def gauge(name: str, by: str, how: str = "sum") -> str:
    return f"{how} by ({by}) ({name}{{{PODS}}})"


def share(part: str, whole: str) -> str:
    return f"{part} / {whole}"


def hit_share(hits: str, misses: str) -> str:
    """Of two counters."""
    return share(per_second(hits), f"({per_second(hits)} + {per_second(misses)})")


GATEWAY = "ep_serve_gateway_"
API = ',route=~"/v1/.*"'

SERVING = {
    "Requests": [
        Panel(
            "Answers", "reqps", {"{{code}}": per_second(f"{GATEWAY}requests_total", "code", API)}
        ),
        Panel(
            "Failed",
            "percentunit",
            {
                "server errors": share(
                    per_second(f"{GATEWAY}requests_total", selector=API + ',code=~"5.."'),
                    per_second(f"{GATEWAY}requests_total", selector=API),
                )
            },
        ),
        Panel(
            "Refused by a limit",
            "reqps",
            {
                "{{limit}}": per_second(f"{GATEWAY}refused_total", "limit"),
                "connection: {{reason}}": per_second(
                    f"{GATEWAY}connections_refused_total", "reason"
                ),
            },
        ),
        Panel("First token", "s", percentiles(f"{GATEWAY}time_to_first_token_seconds")),
        Panel("Whole requests", "s", percentiles(f"{GATEWAY}request_seconds")),
        Panel(
            "Tokens a second of one request", "short", percentiles(f"{GATEWAY}tokens_per_second")
        ),
    ],
    "Queue and engines": [
        Panel(
            "In flight and queued",
            "short",
            {
                "in flight": f"sum({GATEWAY}in_flight{{{PODS}}})",
                "queued": f"sum({GATEWAY}queued{{{PODS}}})",
            },
        ),
        Panel("Wait for an engine", "s", percentiles(f"{GATEWAY}queue_seconds")),
        Panel(
            "Engines that get requests",
            "short",
            {"{{upstream}}": gauge(f"{GATEWAY}upstream_up", "upstream", "min")},
        ),
        Panel(
            "Requests an engine works on",
            "short",
            {"{{upstream}}": gauge(f"{GATEWAY}upstream_requests", "upstream")},
        ),
        Panel(
            "Failed attempts",
            "ops",
            {
                "{{reason}}": per_second(f"{GATEWAY}upstream_failures_total", "reason"),
                "quarantined": per_second(f"{GATEWAY}quarantined_total"),
            },
        ),
        Panel(
            "Repeated media at the same engine",
            "ops",
            {"{{kept}}": per_second(f"{GATEWAY}affinity_total", "kept")},
        ),
    ],
    "Media and tokens": [
        Panel(
            "Media received",
            "Bps",
            {"{{source}}": per_second(f"{GATEWAY}media_bytes_total", "source")},
        ),
        Panel("Probing a medium", "s", percentiles(f"{GATEWAY}probe_seconds")),
        Panel("Store", "bytes", {"{{pod}}": gauge(f"{GATEWAY}store_bytes", "pod")}),
        Panel(
            "Stored already",
            "percentunit",
            {"hits": hit_share(f"{GATEWAY}store_hits_total", f"{GATEWAY}store_misses_total")},
        ),
        Panel(
            "Audio and video tokens",
            "ops",
            {"{{kind}}": per_second(f"{GATEWAY}av_tokens_total", "kind")},
        ),
        Panel(
            "Tokens generated",
            "ops",
            {"completion": per_second(f"{GATEWAY}completion_tokens_total")},
        ),
    ],
}

ENGINES = {
    "Load": [
        Panel("Running", "short", {"{{pod}}": gauge("vllm:num_requests_running", "pod")}),
        Panel("Waiting", "short", {"{{pod}}": gauge("vllm:num_requests_waiting", "pod")}),
        Panel(
            "KV cache in use",
            "percentunit",
            {"{{pod}}": gauge("vllm:kv_cache_usage_perc", "pod", "max")},
        ),
        Panel("Preemptions", "ops", {"{{pod}}": per_second("vllm:num_preemptions_total", "pod")}),
        Panel("First token", "s", percentiles("vllm:time_to_first_token_seconds")),
        Panel("Between tokens", "s", percentiles("vllm:inter_token_latency_seconds")),
    ],
    "Reduction": [
        Panel(
            "Tokens into the sieve and out",
            "ops",
            {
                "{{modality}} in": per_second("ep_serve_av_tokens_full_total", "modality"),
                "{{modality}} out": per_second("ep_serve_av_tokens_kept_total", "modality"),
            },
        ),
        Panel("Keep ratio of requests", "percentunit", percentiles("ep_serve_request_keep_ratio")),
        Panel(
            "Tokens saved in the KV cache",
            "ops",
            {"saved": per_second("ep_serve_kv_tokens_saved_total")},
        ),
        Panel(
            "Where the time goes",
            "percentunit",
            {"{{stage}}": per_second("ep_serve_stage_seconds_total", "stage")},
            "Seconds of each stage in a second, of all pods together.",
        ),
        Panel("Prefill", "s", percentiles("vllm:request_prefill_time_seconds")),
        Panel("Queue in the engine", "s", percentiles("vllm:request_queue_time_seconds")),
    ],
    "Caches": [
        Panel(
            "Tower outputs remembered",
            "percentunit",
            {
                "hits": hit_share(
                    "ep_serve_tower_cache_hits_total", "ep_serve_tower_cache_misses_total"
                )
            },
        ),
        Panel("Tower cache", "bytes", {"{{pod}}": gauge("ep_serve_tower_cache_bytes", "pod")}),
        Panel(
            "Media processed already",
            "percentunit",
            {
                "hits": hit_share(
                    "ep_serve_media_cache_hits_total", "ep_serve_media_cache_misses_total"
                )
            },
        ),
        Panel(
            "Files decoded", "ops", {"{{kind}}": per_second("ep_serve_media_decodes_total", "kind")}
        ),
        Panel(
            "Prompt tokens from the prefix cache",
            "percentunit",
            {
                "hits": share(
                    per_second("vllm:prefix_cache_hits_total"),
                    per_second("vllm:prefix_cache_queries_total"),
                )
            },
        ),
        Panel(
            "Tokens generated",
            "ops",
            {"{{pod}}": per_second("vllm:generation_tokens_total", "pod")},
        ),
    ],
}

DASHBOARDS = {
    "serving": ("ep-serve: serving", SERVING, f"{GATEWAY}requests_total"),
    "engines": ("ep-serve: engines", ENGINES, "vllm:num_requests_running"),
}


def dashboard(name: str) -> dict[str, Any]:
    """One dashboard in Grafana's JSON."""
    title, rows, series = DASHBOARDS[name]
    datasource = {"type": "prometheus", "uid": "${datasource}"}
    return {
        "uid": f"ep-serve-{name}",
        "title": title,
        "tags": ["ep-serve"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "type": "datasource", "query": "prometheus"},
                {
                    "name": "namespace",
                    "type": "query",
                    "datasource": datasource,
                    "query": f"label_values({series}, namespace)",
                    "refresh": 2,
                },
            ]
        },
        "panels": list(_panels(rows, datasource)),
    }


def _panels(rows: dict[str, list[Panel]], datasource: dict[str, str]) -> Iterator[dict[str, Any]]:
    number = top = 0
    for row, panels in rows.items():
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row,
            "collapsed": False,
            "panels": [],
            "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
        }
        top += 1
        for index, panel in enumerate(panels):
            number += 1
            place = {"x": WIDTH * index % COLUMNS, "y": top + WIDTH * index // COLUMNS * HEIGHT}
            yield {
                "id": number,
                "type": "timeseries",
                "title": panel.title,
                "description": panel.note,
                "datasource": datasource,
                "gridPos": {**place, "w": WIDTH, "h": HEIGHT},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "targets": [
                    {"refId": chr(65 + at), "expr": query, "legendFormat": legend}
                    for at, (legend, query) in enumerate(panel.queries.items())
                ],
            }
        top += -(-len(panels) * WIDTH // COLUMNS) * HEIGHT


def outputs() -> dict[Path, str]:
    """The files and their content."""
    return {
        FOLDER / f"{name}.json": json.dumps(dashboard(name), indent=1) + "\n" for name in DASHBOARDS
    }


def main() -> int:
    for file, text in outputs().items():
        file.write_text(text)
        print(f"wrote {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
