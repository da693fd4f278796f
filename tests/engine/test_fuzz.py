"""Nothing that a request holds ends the engine: 2,000 requests, two thirds of them odd."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.engine import fuzz_requests
from tests.engine.client import Client, text, user

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]

AT_ONCE = 40
BATCHES = 50
SECONDS = 120.0
"""Far more than any request takes: a time-out is a request that hangs."""


@settings(
    max_examples=BATCHES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(batch=st.lists(fuzz_requests.requests, min_size=AT_ONCE, max_size=AT_ONCE))
def test_no_request_ends_the_engine(
    any_server: Client, batch: list[tuple[str, dict[str, Any]]]
) -> None:
    problems = asyncio.run(ask_all(any_server.root, batch))
    assert not problems, "\n".join(problems)


def test_the_server_answers_after_all_that(any_server: Client) -> None:
    assert any_server.ask(user(text("Hello"))).token_ids


async def ask_all(root: str, batch: list[tuple[str, dict[str, Any]]]) -> list[str]:
    async with httpx.AsyncClient(base_url=root, timeout=SECONDS) as client:
        problems = await asyncio.gather(*(ask(client, *request) for request in batch))
    async with httpx.AsyncClient(timeout=SECONDS) as client:  # the server may close idle ones
        health = await client.get(f"{root}/health")
    found = [problem for problem in problems if problem]
    return [*found, "/health failed"] if health.status_code != 200 else found


async def ask(client: httpx.AsyncClient, route: str, body: dict[str, Any]) -> str | None:
    """What is wrong with the answer to a request, if something is."""
    sent = json.dumps(body)
    headers = {"content-type": "application/json"}
    try:
        response = await client.post(f"/v1/{route}", content=sent, headers=headers)
    except httpx.HTTPError as error:
        return f"{type(error).__name__}: {route} {sent[:2000]}"
    wrong = response.status_code >= 500 or _failed_event(response.text)
    if response.status_code >= 400 and not response.json()["error"]["message"]:
        wrong = True
    return f"{response.status_code} {response.text[:300]}: {route} {sent[:2000]}" if wrong else None


def _failed_event(content: str) -> bool:
    """Whether a stream ends in an error of the server."""
    if not content.startswith("data: "):
        return False
    events = [line[6:] for line in content.splitlines() if line.startswith("data: {")]
    errors = [event["error"] for event in map(json.loads, events) if "error" in event]
    return any(error["code"] >= 500 for error in errors)
