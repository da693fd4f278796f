from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ep_serve.evaluation import run as running
from ep_serve.evaluation.client import Server
from ep_serve.evaluation.errors import EvaluationError
from ep_serve.evaluation.questions import Question, read_questions
from ep_serve.evaluation.results import RESULTS_NAME, ResultsWriter, Row, read_rows
from ep_serve.evaluation.run import Plan, run
from tests.evaluation.conftest import MakeData, lines
from tests.evaluation.mock_server import MockServer


@pytest.fixture
def questions(make_data: MakeData) -> list[Question]:
    return read_questions(make_data(lines()))


@pytest.fixture
def server(mock: MockServer) -> Iterator[Server]:
    with closing(Server(mock.url, key="secret", name="ours", initial_backoff_s=0.001)) as server:
        yield server


def plan(folder: Path, *ratios: float, selection: bool = False) -> Plan:
    return Plan(folder, ratios or (1.0, 0.1), concurrency=2, selection=selection)


def test_every_question_is_run_at_every_keep_ratio(
    mock: MockServer, server: Server, questions: list[Question], tmp_path: Path
) -> None:
    mock.say = lambda question, ratio: "Red." if ratio == 1 else "blue"
    run(questions, [server], plan(tmp_path), tmp_path / "out")
    rows = read_rows([tmp_path / "out"])
    assert len(rows) == 8
    assert {(row.keep_ratio, row.right) for row in rows} == {(1.0, True), (0.1, False)}
    assert {row.server for row in rows} == {"ours"}
    assert all(row.tokens and row.tokens.av_full == 164 for row in rows)
    assert mock.keys == {"Bearer secret"}


def test_a_request_follows_the_api(
    mock: MockServer, server: Server, questions: list[Question], tmp_path: Path
) -> None:
    run(questions[:1], [server], plan(tmp_path, 0.1), tmp_path)
    (body,) = mock.bodies
    assert body == {
        "model": "mock",
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "video_url",
                        "video_url": {"url": "data:video/mp4;base64,MC5tcDQ="},
                    },
                    {"type": "text", "text": "Which colour, 0?"},
                ],
            }
        ],
        "temperature": 0,
        "max_tokens": 32,
        "keep_ratio": 0.1,
    }


def test_what_has_an_answer_is_not_asked_again(
    mock: MockServer, server: Server, questions: list[Question], tmp_path: Path
) -> None:
    run(questions[:3], [server], plan(tmp_path), tmp_path)
    before = len(mock.bodies)
    run(questions, [server], plan(tmp_path, 1.0, 0.1, 0.2), tmp_path)
    assert len(mock.bodies) - before == 4 * 3 - 3 * 2
    assert len(set(mock.asked)) == len(mock.asked) == 12


def test_a_truncated_line_is_run_again(
    mock: MockServer, server: Server, questions: list[Question], tmp_path: Path
) -> None:
    run(questions, [server], plan(tmp_path), tmp_path)
    path = tmp_path / RESULTS_NAME
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_rows([path])) == 7
    run(questions, [server], plan(tmp_path), tmp_path)
    assert len(mock.bodies) == 9
    assert len(read_rows([path])) == len(path.read_text().splitlines()) == 8


def test_a_changed_question_is_run_again(
    mock: MockServer, server: Server, make_data: MakeData, tmp_path: Path
) -> None:
    changed = lines()
    run(read_questions(make_data(changed)), [server], plan(tmp_path, 1.0), tmp_path)
    changed[0]["answer"] = "blue"
    run(read_questions(make_data(changed)), [server], plan(tmp_path, 1.0), tmp_path)
    assert len(mock.bodies) == 5
    rows = {row.id: row.right for row in read_rows([tmp_path])}
    assert rows == {"q0": False, "q1": True, "q2": True, "q3": True}


def test_a_busy_server_is_retried(
    mock: MockServer, server: Server, questions: list[Question], tmp_path: Path
) -> None:
    mock.failures = [429, 503, 429]
    run(questions, [server], plan(tmp_path), tmp_path)
    assert all(row.right for row in read_rows([tmp_path]))


def test_an_error_is_neither_right_nor_wrong_and_is_retried(
    mock: MockServer, server: Server, questions: list[Question], tmp_path: Path
) -> None:
    mock.failures = [400]
    run(questions, [server], plan(tmp_path), tmp_path)
    (failed,) = (row for row in read_rows([tmp_path]) if row.error)
    assert failed.error == "HTTP 400: not now"
    assert failed.right is None
    run(questions, [server], plan(tmp_path), tmp_path)
    assert len(mock.bodies) == 9
    assert not any(row.error for row in read_rows([tmp_path]))


def test_a_key_that_is_refused_stops_the_run(
    mock: MockServer, server: Server, questions: list[Question], tmp_path: Path
) -> None:
    mock.failures = [401] * 100
    with pytest.raises(EvaluationError, match="HTTP 401: not now"):
        run(questions, [server], plan(tmp_path), tmp_path)


def test_a_server_that_is_gone_stops_the_run(
    mock: MockServer, server: Server, questions: list[Question], tmp_path: Path
) -> None:
    mock.failures = [500] * 100
    wanted = plan(tmp_path, *(r / 10 for r in range(1, 11)))
    with pytest.raises(
        EvaluationError, match=f"{running.MAX_CONSECUTIVE_FAILURES} requests failed in a row"
    ):
        run(questions, [server], wanted, tmp_path)
    assert {row.error for row in read_rows([tmp_path])} == {"HTTP 500: not now"}


def test_tries_have_an_end(questions: list[Question], tmp_path: Path) -> None:
    with closing(Server("http://127.0.0.1:1", model="any", initial_backoff_s=0.0)) as server:
        run(questions[:1], [server], plan(tmp_path, 1.0), tmp_path)
    (row,) = read_rows([tmp_path])
    assert row.error is not None
    assert row.error.startswith("ConnectError")


def test_selections_are_requested_and_completed_later(
    mock: MockServer, server: Server, questions: list[Question], tmp_path: Path
) -> None:
    run(questions, [server], plan(tmp_path, 0.2), tmp_path)
    assert not any(row.placement for row in read_rows([tmp_path]))
    run(questions, [server], plan(tmp_path, 0.2, selection=True), tmp_path)
    assert mock.bodies[-1]["return_selection"] is True
    placements = [row.placement for row in read_rows([tmp_path])]
    assert all(found and found.kept_evidence == 12 + 10 for found in placements)


def test_a_missing_file_is_named_before_any_request(
    mock: MockServer, server: Server, questions: list[Question], tmp_path: Path
) -> None:
    (tmp_path / "1.mp4").unlink()
    with pytest.raises(EvaluationError, match=r"1 files are missing.*1\.mp4"):
        run(questions, [server], plan(tmp_path), tmp_path)
    assert not mock.bodies


def test_two_runs_do_not_write_to_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with ResultsWriter(path), pytest.raises(EvaluationError, match="another evaluation"):
        ResultsWriter(path)


def test_the_last_of_two_rows_counts(tmp_path: Path) -> None:
    row = Row(
        server="a", keep_ratio=1, id="q", clip="c", digest="", task="t", question="?", answer="!"
    )
    with ResultsWriter(tmp_path / RESULTS_NAME) as writer:
        writer.append(row.model_copy(update={"error": "no"}))
        writer.append(row.model_copy(update={"right": True}))
    (found,) = read_rows([tmp_path])
    assert found.right


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps({"server": 1}) + "\n{}\n")
    with pytest.raises(EvaluationError, match="line 1"):
        read_rows([path])
