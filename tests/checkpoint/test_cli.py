from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from ep_serve import cli
from ep_serve.cli import main


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from ep_serve.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'vllm'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "ep_serve", "checkpoint", "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "usage: ep-serve checkpoint" in done.stdout


def test_a_good_checkpoint_passes(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "check", str(embedded)]) == 0
    assert capsys.readouterr().out.endswith("can be served\n")


def test_a_stock_checkpoint_fails(stock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "check", str(stock)]) == 1
    assert capsys.readouterr().out.startswith("error: this is a stock Qwen2.5-Omni checkpoint")


def test_init_says_that_the_result_is_untrained(
    stock: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new"
    command = ["checkpoint", "init", "--from", str(stock), "--to", str(target), "--layers", "2"]
    assert main([*command, "--keep-ratio", "0.1", "--seed", "7"]) == 0
    output = capsys.readouterr().out
    assert "left out: 2 tensors of talker" in output
    assert "UNTRAINED" in output
    assert main(["checkpoint", "check", str(target)]) == 0


def test_the_embedded_model_is_written(tmp_path: Path) -> None:
    assert main(["checkpoint", "embedded", "--to", str(tmp_path / "model")]) == 0
    assert main(["checkpoint", "check", str(tmp_path / "model")]) == 0


def test_a_random_checkpoint_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "embedded", "--to", str(tmp_path / "model"), "--random", "7"]) == 0
    assert (tmp_path / "model" / "config.json").is_file()
    assert "random weights" in capsys.readouterr().out


def test_an_error_is_one_line_on_stderr(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "embedded", "--to", str(embedded)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"ep-serve: {embedded} exists and is not an empty directory\n"


@pytest.mark.parametrize(
    "command", [[], ["checkpoint"], ["sing"], ["checkpoint", "check", "x", "--loud"]]
)
def test_a_wrong_usage_exits_with_2(command: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2


def test_a_command_may_ask_for_the_options_it_does_not_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    def run(arguments: argparse.Namespace) -> int:
        seen.extend(arguments.forwarded)
        return 0

    def add(groups: cli.Groups) -> None:
        groups.add_parser("pass").set_defaults(handler=run, forwards=True)

    monkeypatch.setattr(cli, "COMMANDS", (add,))
    assert main(["pass", "--port", "8000", "--eager"]) == 0
    assert seen == ["--port", "8000", "--eager"]
