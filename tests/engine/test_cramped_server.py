"""A server without room: what is reduced must come out the same, whatever the scheduler does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.clips import make_clip
from tests.engine.client import Client, golden_messages, text, user, video
from tests.goldens import CASES, load_case

pytestmark = pytest.mark.engine

NAMES = [name for name in CASES if "fps" not in name and load_case(name)[0]["stats"]["L"] < 400]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "aiv_a_r100"])
def test_chunks_of_48_tokens_change_nothing(cramped_server: Client, name: str) -> None:
    case, _ = load_case(name)
    body = {"keep_ratio": case["compression_ratio"]}
    for _ in range(2):  # the second time from the prefix cache
        answer = cramped_server.ask(golden_messages(name), **body)
        assert answer.token_ids == case["stats"]["generated_ids"]


def test_preemption_changes_nothing(cramped_server: Client) -> None:
    questions = [
        user(video(make_clip(3, seed=70 + i)), text(f"Question {i}: what is it?")) for i in range(8)
    ]

    def ask(messages: list[dict[str, object]]) -> list[int]:
        return cramped_server.ask(messages, max_tokens=64).token_ids

    before = cramped_server.metric("vllm:num_preemptions_total")
    with ThreadPoolExecutor(len(questions)) as pool:
        together = list(pool.map(ask, questions))
    assert cramped_server.metric("vllm:num_preemptions_total") > before
    assert together == [ask(messages) for messages in questions]


def test_a_prompt_of_five_times_the_sequence_length_runs(cramped_server: Client) -> None:
    clip = make_clip(30, fps=4)
    answer = cramped_server.ask(user(video(clip), text("What is it?")), keep_ratio=0.05)
    assert answer.reduction is not None
    assert answer.reduction["prompt_tokens_full"] >= 5 * 192
    assert answer.reduction["prompt_tokens_reduced"] < 192
    assert len(answer.token_ids) == 8
