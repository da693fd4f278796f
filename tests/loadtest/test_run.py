"""Whole load tests, of the mock."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtest.__main__ import main
from loadtest.records import Report
from tests.loadtest.mock_server import BLOCKS_EACH, MockServer

SMALL = ["--seconds", "1", "--size", "56", "--fps", "4", "--output-tokens", "5"]


def words(mock: MockServer, out: Path, *more: str) -> list[str]:
    return ["run", "--url", mock.url, "--out", str(out), *SMALL, *more]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    """A load test of two keep ratios, unique and repeated media, with a search."""
    from tests.loadtest.mock_server import serving

    out = tmp_path_factory.mktemp("report")
    with serving(MockServer(first_s=0.1, gap_s=0.01)) as mock:
        more = ["--targets", "plain", "0.2", "--concurrency", "1", "--media", "unique"]
        more += ["repeated", "--repeats", "2", "--requests", "3", "--ttft", "10", "--search", "2"]
        assert main(words(mock, out, *more)) == 0
    return Report.load(out / "report.json"), out


def test_every_load_is_run_on_every_target_in_turns(measured: tuple[Report, Path]) -> None:
    report, _ = measured
    assert report.finished is not None
    assert len(report.runs) == 2 * 2 * 2
    assert [run.target for run in report.runs[:4]] == ["plain", "0.2", "plain", "0.2"]
    assert [run.target for run in report.runs[4:8]] == ["0.2", "plain", "0.2", "plain"]
    assert all(answer.status == "ok" for run in report.runs for answer in run.answers)


def test_what_was_measured_is_what_the_server_did(measured: tuple[Report, Path]) -> None:
    report, _ = measured
    alone = {run.target: run for run in report.runs if run.load.label == "c=1"}
    assert alone["plain"].figures["ttft_s"]["min"] >= 0.1
    assert 0.02 <= alone["0.2"].figures["ttft_s"]["min"] < 0.1
    blocks = alone["plain"].figures["server"]["kv_blocks_per_request"]
    assert blocks == pytest.approx(BLOCKS_EACH)


def test_the_report_says_how_it_came_about(measured: tuple[Report, Path]) -> None:
    report, _ = measured
    assert report.command.startswith("python -m loadtest run --url")
    assert report.machine["cores"] > 0
    assert {"python", "aiohttp", "numpy"} <= set(report.versions)
    assert report.scenario["unique"]["clip"]["width"] == 56


def test_the_search_stands_in_the_report(measured: tuple[Report, Path]) -> None:
    report, _ = measured
    assert {search.target: search.largest for search in report.searches} == {"plain": 2, "0.2": 2}


def test_the_page_needs_nothing_else(measured: tuple[Report, Path]) -> None:
    _, out = measured
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    for name in ("latency_throughput", "kv_keep_ratio", "time_lines", "stages"):
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_can_be_drawn_anew_and_compared(
    measured: tuple[Report, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = measured
    file = str(out / "report.json")
    assert main(["report", file]) == 0
    assert "Against plain" in capsys.readouterr().out
    assert main(["compare", file, file]) == 0
    assert "| plain, unique, 1 s, c=1 | 1.00 [" in capsys.readouterr().out


def test_repeats_are_shown_beside_new_clips(measured: tuple[Report, Path]) -> None:
    from loadtest.report import text

    assert "repeated, 1 s, c=1: known clip" in text(measured[0])


def test_lengths_of_clips_get_a_straight_line(mock: MockServer, tmp_path: Path) -> None:
    more = ["--concurrency", "1", "--requests", "1", "--repeats", "1"]
    line = words(mock, tmp_path, *more)
    at = line.index("--seconds")
    assert main([*line[: at + 1], "1", "2", *line[at + 2 :]]) == 0
    assert (tmp_path / "clip_length.png").is_file()
    from loadtest.report import text

    shown = text(Report.load(tmp_path / "report.json"))
    assert "a straight line" in shown
    assert "first token, s: plain, unique, c=1 |" in shown


def test_a_server_that_refuses_everything_is_reported(mock: MockServer, tmp_path: Path) -> None:
    mock.mode = "busy"
    line = words(mock, tmp_path, "--concurrency", "1", "--requests", "2", "--repeats", "1")
    assert main(line) == 0
    report = Report.load(tmp_path / "report.json")
    assert report.runs[0].figures["errors"] == {"http 503": 2}
    assert "warm-up requests failed" in report.notes[0]


def test_prompts_of_two_lengths_are_named(mock: MockServer) -> None:
    from loadtest.run import prompt_length_note
    from tests.loadtest.requests import report, run, whole

    ours = whole(1.0).model_copy(update={"reduction": {"prompt_tokens_full": 200}})
    note = prompt_length_note(report([run("stock", [whole(1.0)]), run("0.2", [ours])]))
    assert note is not None
    assert "100 tokens to stock vLLM and 200 to this engine" in note


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_what_was_measured(
    mock: MockServer, tmp_path: Path, stop: signal.Signals
) -> None:
    mock.first_s, mock.serial = 0.2, True
    line = words(mock, tmp_path, "--targets", "plain", "--concurrency", "1", "3")
    line += ["--requests", "20", "--repeats", "1", "--warmup", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest", *line],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # Jobs in the background of a shell script ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while len(mock.bodies) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(stop)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    report = Report.load(tmp_path / "report.json")
    assert report.finished is None
    (run,) = report.runs
    assert run.interrupted
    assert run.figures["whole"] >= 3
    assert run.figures["cut"] == 1
    assert "Interrupted" in (tmp_path / "report.html").read_text()
    assert "cut short" in out


def test_aiperf_gets_the_same_requests(mock: MockServer, tmp_path: Path) -> None:
    more = ["--targets", "0.1", "--concurrency", "2", "--rate", "3", "--arrivals", "gamma"]
    more += ["--model", "m", "--repeats", "1", "--warmup", "0"]
    assert main([*words(mock, tmp_path / "aiperf", *more), "--generator", "aiperf"]) == 0
    script = (tmp_path / "aiperf" / "aiperf.sh").read_text()
    closed, opened = (x for x in script.splitlines() if "aiperf profile" in x)
    assert "env -u HF_HUB_OFFLINE" in closed
    assert "--custom-dataset-type raw_payload" in closed
    assert "--concurrency 2 " in f"{closed} "
    assert "--request-rate 3 --arrival-pattern gamma --arrival-smoothness 1" in opened
    assert main(words(mock, tmp_path / "own", *more)) == 0
    files = sorted((tmp_path / "aiperf").glob("*.jsonl"))
    lines = [json.loads(x) for file in files for x in file.read_text().splitlines()]
    assert len(files) == 2
    assert sorted(map(json.dumps, lines)) == sorted(map(json.dumps, mock.bodies))


def test_a_wrong_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--targets", "fast"]) == 1
    assert "loadtest: 'fast' is neither a target" in capsys.readouterr().err
