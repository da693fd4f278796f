"""`ep-serve eval` and `ep-serve inspect`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ep_serve.evaluation.client import Server

_NAMED = re.compile(r"([\w.-]+)=(.+)")
KEEP_RATIOS = (1.0, 0.2, 0.1, 0.05)


def add_eval_options(parser: argparse.ArgumentParser) -> None:
    """`ep-serve eval make | run | report`."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    make = actions.add_parser("make", help="write this project's benchmark: clips and questions")
    make.add_argument(
        "--to", type=Path, required=True, metavar="DIR", dest="target", help="folder to make"
    )
    make.add_argument("--clips", type=int, default=320, help="[320]")
    make.add_argument("--questions", type=int, default=4, help="about each clip [4]")
    make.add_argument("--seed", type=int, default=0, help="another one makes other clips [0]")
    make.set_defaults(handler=make_benchmark)

    run = actions.add_parser(
        "run",
        help="ask a benchmark through the API of servers, and report",
        description="Ask every question of every server at every keep ratio. A run that was "
        "interrupted is resumed by the same command, which skips answered questions.",
    )
    run.add_argument("--data", type=Path, required=True, metavar="FILE", help="JSONL of questions")
    run.add_argument(
        "--media", type=Path, metavar="DIR", help="where its paths start from [the file's folder]"
    )
    _add_server_options(run)
    run.add_argument(
        "--keep-ratios", type=_ratio, nargs="+", default=KEEP_RATIOS, help="[1 0.2 0.1 0.05]"
    )
    run.add_argument("--concurrency", type=_positive_int, default=4, help="requests at a time [4]")
    run.add_argument("--max-tokens", type=_positive_int, default=32, help="of an answer [32]")
    run.add_argument("--selection", action="store_true", help="also ask where the kept tokens lie")
    run.add_argument(
        "--to", type=Path, required=True, metavar="RESULTS", dest="target", help="folder of results"
    )
    run.set_defaults(handler=run_benchmark)

    report = actions.add_parser("report", help="write the report of one or several runs")
    report.add_argument("results", type=Path, nargs="+", help="folders or files of results")
    report.add_argument(
        "--to", type=Path, metavar="DIR", dest="target", help="[the first folder of results]"
    )
    report.set_defaults(handler=report_results)


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    """`ep-serve inspect CLIP`."""
    parser.add_argument("clip", type=Path, help="a video, sound or picture")
    parser.add_argument(
        "--question", action="append", required=True, help="may be given several times"
    )
    parser.add_argument(
        "--keep-ratios", type=_ratio, nargs="+", default=(0.2, 0.1, 0.05), help="[0.2 0.1 0.05]"
    )
    _add_server_options(parser)
    parser.add_argument("--max-tokens", type=_positive_int, default=128, help="of an answer [128]")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FILE", dest="target", help="page to write"
    )
    parser.set_defaults(handler=inspect_clip)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server",
        action="append",
        required=True,
        metavar="[NAME=]URL",
        dest="servers",
        help="of an OpenAI API; may be given several times, the name is that in the report",
    )
    parser.add_argument("--api-key", help="[OPENAI_API_KEY, if it is set]")
    parser.add_argument("--model", help="[the first that the server lists]")


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and up to 1, not {text!r}")
    return ratio


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def make_benchmark(arguments: argparse.Namespace) -> int:
    """Generate the benchmark."""
    from ep_serve.evaluation.benchmark import QUESTIONS_NAME, Plan, make

    try:
        plan = Plan(arguments.clips, arguments.questions, arguments.seed)
    except ValueError as error:
        return _print_error(error)
    made = make(arguments.target, plan)
    print(
        f"{arguments.target / QUESTIONS_NAME}: {made['questions']} questions, {made['clips']} clips"
    )
    return 0


def run_benchmark(arguments: argparse.Namespace) -> int:
    """Run the questions without a result, then write the report."""
    from ep_serve.evaluation.errors import EvaluationError
    from ep_serve.evaluation.questions import read_questions
    from ep_serve.evaluation.report import write
    from ep_serve.evaluation.results import read_rows
    from ep_serve.evaluation.run import Plan, run

    plan = Plan(
        media=arguments.media or arguments.data.parent,
        keep_ratios=tuple(dict.fromkeys(arguments.keep_ratios)),
        concurrency=arguments.concurrency,
        max_tokens=arguments.max_tokens,
        selection=arguments.selection,
    )
    target: Path = arguments.target
    try:
        questions = read_questions(arguments.data)
        with _servers(arguments) as servers:
            run(questions, servers, plan, target)
        print(write(read_rows([target]), target))
    except EvaluationError as error:
        return _print_error(error)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command resumes here.", file=sys.stderr)
        return 1
    return 0


def report_results(arguments: argparse.Namespace) -> int:
    """Write the report."""
    from ep_serve.evaluation.errors import EvaluationError
    from ep_serve.evaluation.report import write
    from ep_serve.evaluation.results import read_rows

    first: Path = arguments.results[0]
    try:
        rows = read_rows(arguments.results)
        print(write(rows, arguments.target or (first if first.is_dir() else first.parent)))
    except EvaluationError as error:
        return _print_error(error)
    return 0


def inspect_clip(arguments: argparse.Namespace) -> int:
    """Request completions and write the inspection page."""
    from ep_serve.evaluation.errors import EvaluationError
    from ep_serve.evaluation.inspection import inspect
    from ep_serve.media import MediaError

    try:
        with _servers(arguments) as servers:
            inspect(
                arguments.clip,
                arguments.question,
                tuple(dict.fromkeys(arguments.keep_ratios)),
                servers,
                arguments.target,
                max_tokens=arguments.max_tokens,
            )
    except (EvaluationError, MediaError) as error:
        return _print_error(error)
    print(arguments.target)
    return 0


@contextmanager
def _servers(arguments: argparse.Namespace) -> Iterator[list[Server]]:
    """Clients of the given servers, with unique names."""
    from ep_serve.evaluation.client import Server
    from ep_serve.evaluation.errors import EvaluationError

    key = arguments.api_key or os.environ.get("OPENAI_API_KEY", "none")
    servers: list[Server] = []
    with ExitStack() as stack:
        for text in arguments.servers:
            named = _NAMED.fullmatch(text)
            name, url = (named[1], named[2]) if named else (None, text)
            server = Server(url, key=key, model=arguments.model, name=name)
            stack.callback(server.close)
            if server.name in (other.name for other in servers):
                raise EvaluationError(
                    f"two servers are called {server.name}: name them, as in a={url}"
                )
            servers.append(server)
        yield servers


def _print_error(error: Exception) -> int:
    print(f"ep-serve: {error}", file=sys.stderr)
    return 1
