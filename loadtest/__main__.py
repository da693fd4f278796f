"""`python -m loadtest`: run a load test, compare two, or render a report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from loadtest.options import add_options

DESCRIPTION = """\
Load tests of multimodal servers with video clips.

  python -m loadtest run                    stock vLLM, no reduction, keep ratios 0.2 and 0.05:
                                            the reference shape, clips of 10 s
  python -m loadtest run --url http://localhost:8000/v1 --targets plain 0.1
  python -m loadtest compare A.json B.json  ratios with confidence intervals
  python -m loadtest report report.json     tables and page from a JSON file
  python -m loadtest.shapes                 analytical bounds
  python -m loadtest.reference DIR          the checkpoints alone
"""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    args = parser().parse_args(words)
    try:
        if args.command == "run":
            from loadtest.run import run

            return run(args, words)
        return _compare(args) if args.command == "compare" else _report(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """All commands."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_options(groups.add_parser("run", help="measure servers"))
    compare = groups.add_parser("compare", help="ratios of two reports, A / B")
    compare.add_argument("a", type=Path, metavar="A.json")
    compare.add_argument("b", type=Path, metavar="B.json")
    report = groups.add_parser("report", help="tables and page of a report")
    report.add_argument("json", type=Path, metavar="report.json")
    return parser


def _compare(args: argparse.Namespace) -> int:
    from loadtest.compare import compare
    from loadtest.records import Report

    print(compare(Report.load(args.a), Report.load(args.b)))
    return 0


def _report(args: argparse.Namespace) -> int:
    from loadtest import report
    from loadtest.measures import ServiceLevel, figures
    from loadtest.records import Report

    record = Report.load(args.json)
    level = ServiceLevel(**record.level)  # type: ignore[arg-type]  # attain is never None
    for run in record.runs:  # older files may lack some figures
        run.figures = figures(run, level)
    page = report.write(record, args.json.parent)
    print(f"{report.text(record)}\n\n{page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
