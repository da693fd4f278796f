"""Data model of a report: all observations of a load test in one JSON file.

Times are seconds; those of a run count from its start. Figures are derived from these records by
`measures` and stored with them, so a report can be rendered again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Novelty = Literal["new", "known clip", "repeated"]
Status = Literal["ok", "error", "incomplete", "cut"]


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Answer(Record):
    """One request and its answer."""

    number: int
    novelty: Novelty = "new"
    """A new clip, another question about a repeated clip, or a repeated request."""
    scheduled_s: float | None = None
    """When it should have been sent, in an open loop."""
    sent_s: float
    chunk_s: list[float] = Field(default_factory=list)
    """When each chunk with text in it came."""
    ended_s: float | None = None
    status: Status = "cut"
    """`incomplete`: the stream ended early. `cut`: the run did, while this was under way."""
    error: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reduction: dict[str, Any] | None = None
    """`usage.reduction`, where the server sends it."""

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token that is not empty."""
        return self.chunk_s[0] - self.sent_s if self.chunk_s else None

    @property
    def e2e_s(self) -> float | None:
        """Time to the last token."""
        return self.chunk_s[-1] - self.sent_s if self.chunk_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time for each output token after the first."""
        if len(self.chunk_s) < 2 or self.output_tokens < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        """Times between chunks: the inter-token latencies a reader sees."""
        return [b - a for a, b in zip(self.chunk_s, self.chunk_s[1:], strict=False)]


class Load(Record):
    """How requests are sent: in a closed loop, or at a rate."""

    kind: Literal["closed", "poisson", "gamma", "constant"] = "closed"
    value: float
    """Requests at a time in a closed loop, requests a second otherwise."""
    burstiness: float = 1.0
    """Of gamma arrivals: their shape; 1 is Poisson, less comes in bursts."""

    @property
    def label(self) -> str:
        return f"c={self.value:g}" if self.kind == "closed" else f"{self.kind} {self.value:g}/s"


class Sample(Record):
    """Metrics of the server at one time."""

    at_s: float
    kv_use: float | None = None
    running: float | None = None
    waiting: float | None = None
    tower_cache_bytes: float | None = None
    memory_bytes: int | None = None


class Run(Record):
    """One load on one target, once."""

    target: str
    media: Literal["unique", "repeated"]
    seconds: float
    """Length of the clips."""
    load: Load
    repeat: int
    started: str
    """UTC, ISO 8601."""
    wall_s: float = 0.0
    interrupted: bool = False
    answers: list[Answer] = Field(default_factory=list)
    samples: list[Sample] = Field(default_factory=list)
    counters: dict[str, float] = Field(default_factory=dict)
    """Growth of the server's counters during the run."""
    kv_blocks: int | None = None
    block_size: int | None = None
    figures: dict[str, Any] = Field(default_factory=dict)

    @property
    def cell(self) -> tuple[str, str, float, str]:
        """Key of a measurement, shared by its repeats."""
        return (self.target, self.media, self.seconds, self.load.label)


class Probe(Record):
    """One step of a search."""

    concurrency: int
    met: bool
    attained: float
    """Share of requests inside the service level."""


class Search(Record):
    """The largest concurrency that meets the service level; 0 if none does."""

    target: str
    seconds: float
    largest: int
    probes: list[Probe]


class TargetRecord(Record):
    """A server that was measured."""

    name: str
    command: str
    start_s: float | None = None
    body: dict[str, Any] = Field(default_factory=dict)
    """Fields of every request to it."""


class Bounds(Record):
    """Analytical bounds of the gains over all tokens, see `shapes`."""

    target: str
    seconds: float
    first_token: float
    request: float
    kv: float


class Report(Record):
    """All of one load test."""

    schema_version: Literal[1] = 1
    command: str
    started: str
    finished: str | None = None
    """None: it was interrupted; what is here was measured."""
    seed: int
    machine: dict[str, Any]
    versions: dict[str, str]
    scenario: dict[str, Any]
    level: dict[str, float | None]
    baseline: str | None = None
    targets: list[TargetRecord] = Field(default_factory=list)
    runs: list[Run] = Field(default_factory=list)
    searches: list[Search] = Field(default_factory=list)
    bounds: list[Bounds] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the file atomically."""
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(self.model_dump_json(indent=1), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a file that `save` wrote.

        Raises:
            OSError: no such file.
            ValueError: it is not a report.
        """
        return cls.model_validate_json(path.read_bytes())
