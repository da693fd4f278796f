"""Generate requests and their arrival times from a seed.

Clips are encoded and bodies written before a run, so that the machine only serves while it is
measured.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from loadtest.clips import ClipShape, make_clip
from loadtest.records import Load, Novelty

QUESTIONS = (
    "What is seen and heard in this clip?",
    "Describe the sound of this clip in detail.",
    "Which colours appear, and when do they?",
    "What moves in the picture, and where to?",
    "Does the sound fit what is seen? Why?",
    "What happens in the second half of it?",
    "How many different sounds can be heard?",
    "Give this clip a title and a summary.",
    "What is at the left edge at the start?",
    "When does the sound change most of all?",
    "What would a listener not know of it?",
    "Is anything repeated, and how often?",
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """The mix of requests."""

    clip: ClipShape
    output_tokens: int = 8
    questions: tuple[str, ...] = QUESTIONS
    repeat_media: float = 0.0
    """Share of requests with a repeated clip; 0 makes every clip unique."""
    repeat_questions: float = 0.0
    """Share of those with a repeated question."""

    def __post_init__(self) -> None:
        for name in ("repeat_media", "repeat_questions"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.output_tokens < 1:
            raise ValueError(f"output_tokens must be at least 1, got {self.output_tokens}")
        if not self.questions:
            raise ValueError("questions must not be empty")


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """Clip and question of one request."""

    number: int
    clip: int
    """Seed of the clip."""
    question: str
    novelty: Novelty


@dataclass(frozen=True, slots=True)
class Request:
    """A `PlannedRequest` with its body."""

    planned: PlannedRequest
    body: bytes = field(repr=False)


def derive(seed: int, *words: object) -> int:
    """Derive a seed for one purpose."""
    return zlib.crc32(repr((seed, *words)).encode())


def plan(scenario: Scenario, count: int, seed: int) -> list[PlannedRequest]:
    """Draw `count` requests."""
    rng = np.random.default_rng(seed)
    asked: dict[int, list[str]] = {}
    plan: list[PlannedRequest] = []
    for number in range(count):
        if asked and rng.random() < scenario.repeat_media:
            clip = int(rng.choice(list(asked)))
            question, novelty = _next_question(scenario, asked[clip], rng)
        else:
            clip = derive(seed, "clip", number)
            question, novelty = str(rng.choice(scenario.questions)), "new"
        asked.setdefault(clip, []).append(question)
        plan.append(PlannedRequest(number, clip, question, novelty))
    return plan


def _next_question(
    scenario: Scenario, asked: list[str], rng: np.random.Generator
) -> tuple[str, Novelty]:
    left = [question for question in scenario.questions if question not in asked]
    if not left or rng.random() < scenario.repeat_questions:
        return str(rng.choice(asked)), "repeated"
    return str(rng.choice(left)), "known clip"


def prepare(
    scenario: Scenario, requests: list[PlannedRequest], model: str, fields: Mapping[str, Any]
) -> Iterator[Request]:
    """Encode the clips and write the bodies.

    Args:
        scenario: clips and answer length.
        requests: from `plan`.
        model: the served model name.
        fields: of every body, such as `keep_ratio`.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        urls = {
            seed: pool.submit(_data_url, scenario.clip, seed)
            for seed in dict.fromkeys(planned.clip for planned in requests)
        }
        for planned in requests:
            yield Request(
                planned, body(scenario, planned, urls[planned.clip].result(), model, fields)
            )


def _data_url(shape: ClipShape, seed: int) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(make_clip(shape, seed)).decode()}"


def body(
    scenario: Scenario, planned: PlannedRequest, url: str, model: str, fields: Mapping[str, Any]
) -> bytes:
    """The JSON of one request: streamed, greedy, with exactly `output_tokens` tokens."""
    content = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": planned.question},
    ]
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": scenario.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields,
        }
    ).encode()


def arrivals(load: Load, count: int, seed: int) -> list[float] | None:
    """Arrival times of `count` requests in seconds; None in a closed loop.

    Gaps have the mean 1 / rate: always the same, exponential, or from a gamma distribution of the
    shape `burstiness`.
    """
    if load.kind == "closed":
        return None
    rng = np.random.default_rng([seed, 0xA77])
    if load.kind == "constant":
        gaps = np.full(count, 1 / load.value)
    elif load.kind == "poisson":
        gaps = rng.exponential(1 / load.value, count)
    else:
        gaps = rng.gamma(load.burstiness, 1 / (load.value * load.burstiness), count)
    times: list[float] = np.cumsum(gaps).tolist()
    return times
