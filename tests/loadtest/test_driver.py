from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from loadtest.driver import Recording, events
from tests.loadtest.mock_server import MockServer
from tests.loadtest.requests import drive

SLACK_S = 0.3
"""A busy machine may be late by this; it is never early."""


def on_time(value: float | None, expected: float) -> bool:
    return value is not None and expected - 0.005 <= value <= expected + SLACK_S


def test_the_first_token_is_the_first_chunk_with_text(mock: MockServer) -> None:
    mock.first_s = 0.2
    (answer,) = drive(mock).answers
    assert on_time(answer.ttft_s, 0.2)


def test_the_time_per_token_leaves_the_first_one_out(mock: MockServer) -> None:
    mock.first_s, mock.gap_s = 0.3, 0.1
    (answer,) = drive(mock).answers
    assert answer.tpot_s is not None
    assert 0.095 <= answer.tpot_s < 0.135  # with the first token in it, 0.14 or 0.175
    assert len(answer.gaps_s) == 4
    assert on_time(answer.e2e_s, 0.7)


def test_usage_is_noted(mock: MockServer) -> None:
    (answer,) = drive(mock).answers
    assert (answer.status, answer.prompt_tokens, answer.output_tokens) == ("ok", 1000, 5)
    assert answer.reduction is not None


def test_a_closed_loop_keeps_its_concurrency(mock: MockServer) -> None:
    recording = drive(mock, count=12, concurrency=4)
    assert mock.most == 4
    assert len(recording.answers) == 12
    rounds = 3 * (mock.first_s + 4 * mock.gap_s)
    assert on_time(recording.wall_s, rounds)


def test_an_open_loop_sends_on_time_whatever_is_under_way(mock: MockServer) -> None:
    mock.first_s = 1.0
    times = [0.05 * number for number in range(8)]
    recording = drive(mock, count=8, times=times)
    assert mock.most == 8
    for answer in recording.answers:
        assert answer.scheduled_s is not None
        assert on_time(answer.sent_s, answer.scheduled_s)


@pytest.mark.parametrize(
    ("mode", "status", "error"),
    [
        ("busy", "error", "http 503"),
        ("error event", "error", "error in the stream"),
        ("cut", "incomplete", ""),
        ("short", "incomplete", ""),
    ],
)
def test_errors_and_incomplete_answers_are_distinguished(
    mock: MockServer, mode: str, status: str, error: str
) -> None:
    mock.mode = mode  # type: ignore[assignment]
    (answer,) = drive(mock, output_tokens=5).answers
    assert (answer.status, answer.error) == (status, error)


def test_a_server_that_hangs_is_given_up(mock: MockServer) -> None:
    mock.mode = "hang"
    (answer,) = drive(mock, timeout_s=0.3).answers
    assert (answer.status, answer.error) == ("error", "timeout")


def test_a_server_that_is_not_there_is_an_error() -> None:
    (answer,) = drive(MockServer(port=1)).answers
    assert answer.status == "error"
    assert "Connect" in answer.error


def test_what_a_cancelled_run_saw_is_kept(mock: MockServer) -> None:
    from loadtest.driver import Driver
    from tests.loadtest.requests import requests

    mock.serial = True
    recording = Recording()

    async def interrupted() -> None:
        driver = Driver(f"{mock.url}/chat/completions")
        async with asyncio.timeout(0.8):
            await driver.closed(requests(10), 2, recording)

    with pytest.raises(TimeoutError):
        asyncio.run(interrupted())
    states = [answer.status for answer in recording.answers]
    assert set(states) == {"ok", "cut"}
    assert on_time(recording.wall_s, 0.8)


def test_events_are_whole_however_the_bytes_are_cut() -> None:
    stream = b'data: {"a":1}\n\n: note\r\ndata:{"b":2}\r\n\r\ndata: [DONE]'

    async def collect(size: int) -> list[bytes]:
        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(stream), size):
                yield stream[start : start + size]

        return [event async for event in events(pieces())]

    for size in (1, 2, 3, 7, len(stream)):
        assert asyncio.run(collect(size)) == [b'{"a":1}', b'{"b":2}', b"[DONE]"]
