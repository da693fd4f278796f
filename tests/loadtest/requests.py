"""Requests and records for tests, made without clips."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from loadtest.driver import Driver, Recording
from loadtest.measures import ServiceLevel, figures
from loadtest.records import Answer, Load, Report, Run
from loadtest.scenario import PlannedRequest, Request
from tests.loadtest.mock_server import MockServer

NO_LEVEL = ServiceLevel()


def requests(count: int, **body: Any) -> list[Request]:
    """Requests whose body is nothing but `body`."""
    return [
        Request(
            PlannedRequest(number, number, "What?", "new"),
            json.dumps({"model": "mock", **body}).encode(),
        )
        for number in range(count)
    ]


def drive(
    server: MockServer,
    count: int = 1,
    concurrency: int = 1,
    times: Sequence[float] | None = None,
    **options: Any,
) -> Recording:
    """Send `count` requests to a server and return what was seen."""
    recording = Recording()
    driver = Driver(f"{server.url}/chat/completions", **options)
    if times is None:
        asyncio.run(driver.closed(requests(count), concurrency, recording))
    else:
        asyncio.run(driver.open(requests(count), times, recording))
    return recording


def whole(ttft: float, tokens: int = 5, gap: float = 0.1, sent: float = 0.0) -> Answer:
    """An answer whose first token came after `ttft` and the others `gap` apart."""
    chunks = [sent + ttft + gap * number for number in range(tokens)]
    return Answer(
        number=0,
        sent_s=sent,
        chunk_s=chunks,
        ended_s=chunks[-1],
        status="ok",
        output_tokens=tokens,
        prompt_tokens=100,
    )


def run(target: str = "t", answers: Sequence[Answer] = (), repeat: int = 0, **fields: Any) -> Run:
    """A run of 10 s with these answers and its figures."""
    values: dict[str, Any] = {
        "media": "unique",
        "seconds": 10.0,
        "load": Load(value=1),
        "started": "2026-01-01T00:00:00+00:00",
        "wall_s": 10.0,
        **fields,
    }
    made = Run(target=target, repeat=repeat, answers=list(answers), **values)
    made.figures = figures(made, NO_LEVEL)
    return made


def report(runs: Sequence[Run], **fields: Any) -> Report:
    """A report of these runs."""
    values: dict[str, Any] = {
        "command": "test",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T01:00:00+00:00",
        "seed": 0,
        "machine": {"cores": 2},
        "versions": {},
        "scenario": {},
        "level": asdict(NO_LEVEL),
        **fields,
    }
    return Report(runs=list(runs), **values)
