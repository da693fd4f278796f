from __future__ import annotations

from pathlib import Path

import pytest

from ep_serve.cli import main
from tests.evaluation.conftest import MakeData, lines
from tests.evaluation.mock_server import MockServer, serving


def test_a_run_ends_with_a_report(
    mock: MockServer, make_data: MakeData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, target = make_data(lines()), tmp_path / "out"
    words = [
        "eval",
        "run",
        "--data",
        str(data),
        "--server",
        f"a={mock.url}/v1",
        "--to",
        str(target),
    ]
    assert main([*words, "--keep-ratios", "1", "0.1", "--selection"]) == 0
    assert capsys.readouterr().out == f"{target / 'report.html'}\n"
    assert sorted(path.name for path in target.iterdir()) == [
        "report.html",
        "report.json",
        "results.jsonl",
    ]
    assert len(mock.bodies) == 8


def test_servers_are_compared_in_one_report(
    mock: MockServer, make_data: MakeData, tmp_path: Path
) -> None:
    data = make_data(lines())
    with serving(MockServer(say=lambda question, ratio: "blue")) as other:
        for name, url in (("a", mock.url), ("b", other.url)):
            words = [
                "--server",
                f"{name}={url}",
                "--keep-ratios",
                "1",
                "--to",
                str(tmp_path / name),
            ]
            assert main(["eval", "run", "--data", str(data), *words]) == 0
    results = [str(tmp_path / name) for name in "ab"]
    assert main(["eval", "report", *results, "--to", str(tmp_path / "both")]) == 0
    assert "b: 0.0 % with" in (tmp_path / "both" / "report.html").read_text()


def test_two_servers_need_two_names(
    mock: MockServer, make_data: MakeData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--server", mock.url, "--server", mock.url, "--to", str(tmp_path)]
    assert main(["eval", "run", "--data", str(make_data(lines())), *words]) == 1
    assert "two servers are called mock" in capsys.readouterr().err


@pytest.mark.parametrize("ratio", ["0", "1.1", "half"])
def test_a_keep_ratio_out_of_bounds_is_a_wrong_usage(
    ratio: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "run", "--keep-ratios", ratio])
    assert "above 0 and up to 1" in capsys.readouterr().err


def test_what_is_wrong_with_a_benchmark_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "q.jsonl").write_text("{}\n")
    words = ["--data", str(tmp_path / "q.jsonl"), "--server", "http://127.0.0.1:1"]
    assert main(["eval", "run", *words, "--to", str(tmp_path)]) == 1
    assert "q.jsonl, line 1: id: Field required" in capsys.readouterr().err
