"""Command line options of `python -m loadtest run`."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from loadtest.campaign import Media, Plan
from loadtest.clips import ClipShape
from loadtest.measures import ServiceLevel
from loadtest.records import Load
from loadtest.scenario import QUESTIONS, Scenario
from loadtest.shapes import SHAPES, ModelShape, Prompt, from_checkpoint
from loadtest.targets import ServerSettings, Target

FOLDER = Path("build/loadtest")
TEXT_TOKENS = 512
"""Tokens left for the question, the system prompt and the answer beside the media."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options; the defaults are a small comparison of under 15 minutes."""
    what = parser.add_argument_group("targets")
    what.add_argument(
        "--targets",
        nargs="+",
        metavar="T",
        help="stock, none, a keep ratio, SIEVE@RATIO (stock none 0.2 0.05); with --url also plain",
    )
    what.add_argument("--url", help="a running server, with /v1; by default servers are started")
    what.add_argument("--model", help="its model (the first it lists)")
    what.add_argument("--shape", default="reference", help=f"random weights: {', '.join(SHAPES)}")
    what.add_argument("--checkpoint", type=Path, help="a real one instead, with refiner")
    what.add_argument("--stock-checkpoint", type=Path, help="its stock twin")
    clips = parser.add_argument_group("clips and questions")
    clips.add_argument("--seconds", type=float, nargs="+", default=[10.0], help="lengths (10)")
    clips.add_argument("--size", type=int, default=336, help="width and height in pixels (336)")
    clips.add_argument("--fps", type=int, default=8, help="of the file (8)")
    clips.add_argument("--silent", action="store_true", help="clips without sound")
    clips.add_argument("--questions", type=Path, help="a file with one on each line")
    clips.add_argument("--output-tokens", type=int, default=8, help="of every answer (8)")
    clips.add_argument(
        "--media",
        nargs="+",
        choices=("unique", "repeated"),
        default=["unique"],
        help="unique clips, repeated ones, or both, one after the other (unique)",
    )
    clips.add_argument("--repeat-media", type=float, default=0.5, help="share of repeated ones")
    clips.add_argument("--repeat-questions", type=float, default=0.2, help="share among these")
    load = parser.add_argument_group("load")
    load.add_argument("--concurrency", type=int, nargs="*", default=None, help="closed loops (1 2)")
    load.add_argument("--rate", type=float, nargs="*", default=[], help="open loops, requests/s")
    load.add_argument("--arrivals", choices=("poisson", "gamma", "constant"), default="poisson")
    load.add_argument("--burstiness", type=float, default=1.0, help="shape of gamma arrivals (1)")
    load.add_argument(
        "--requests", type=int, default=3, help="in a run, at least twice the concurrency (3)"
    )
    load.add_argument("--repeats", type=int, default=2, help="rounds (2)")
    load.add_argument("--warmup", type=int, default=1, help="excluded, for each target (1)")
    load.add_argument("--timeout", type=float, default=900.0, help="of a request in s (900)")
    load.add_argument("--seed", type=int, default=0)
    level = parser.add_argument_group("service level")
    level.add_argument("--ttft", type=float, help="longest time to first token in s")
    level.add_argument("--tpot", type=float, help="longest time per output token in s")
    level.add_argument("--e2e", type=float, help="longest time to the last token in s")
    level.add_argument("--attain", type=float, default=0.9, help="share that must keep it (0.9)")
    level.add_argument(
        "--search", type=int, default=0, metavar="N", help="find the largest concurrency up to N"
    )
    servers = parser.add_argument_group("servers that are started")
    servers.add_argument(
        "--apart", action="store_true", help="one at a time, where memory is short"
    )
    servers.add_argument("--eager", action="store_true", help="do not compile")
    servers.add_argument("--kv-gib", type=float, default=2.0, help="KV cache (2)")
    servers.add_argument("--block-size", type=int, default=32, help="tokens in a KV block (32)")
    servers.add_argument("--max-model-len", type=int, help="(what the clips need)")
    servers.add_argument("--min-pixels", type=int, help="smaller frames are enlarged to it")
    servers.add_argument("--server-option", action="append", default=[], help="for all; repeat it")
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, help=f"folder ({FOLDER}/reports/DATE)")
    out.add_argument(
        "--generator",
        choices=("own", "aiperf"),
        default="own",
        help="aiperf: only write the requests and AIPerf's command lines",
    )


@dataclass(frozen=True)
class Setup:
    """A parsed command line."""

    targets: list[Target]
    plan: Plan
    url: str | None
    model: str | None
    headers: dict[str, str]
    shape: ModelShape | None

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Setup:
        """Parse and validate the options.

        Raises:
            ValueError: an option is invalid, or conflicts with another.
            OSError: a file cannot be read.
        """
        remote = args.url is not None
        words = args.targets or (["plain"] if remote else ["stock", "none", "0.2", "0.05"])
        targets = [Target.parse(word, remote=remote) for word in dict.fromkeys(words)]
        key = os.environ.get("LOADTEST_API_KEY")  # not an option: it would stay in the report
        return cls(
            targets=targets,
            plan=_plan(args),
            url=args.url.rstrip("/") if remote else None,
            model=args.model,
            headers={"authorization": f"Bearer {key}"} if key else {},
            shape=_shape(args, remote),
        )

    @property
    def baseline(self) -> str | None:
        """Name of the baseline: stock, no reduction, or the first target."""
        names = [target.name for target in self.targets]
        return next((name for name in ("stock", "none") if name in names), names[0])


def _shape(args: argparse.Namespace, remote: bool) -> ModelShape | None:
    if args.checkpoint is not None:
        return from_checkpoint(args.checkpoint)
    if remote:
        return None  # the shape of a remote model is unknown
    if args.shape not in SHAPES:
        raise ValueError(f"--shape must be one of {', '.join(SHAPES)}, got {args.shape}")
    return SHAPES[args.shape]


def _plan(args: argparse.Namespace) -> Plan:
    loads = _loads(args)
    level = ServiceLevel(args.ttft, args.tpot, args.e2e, args.attain)
    if args.search and not level.is_set:
        raise ValueError("--search needs a service level: --ttft, --tpot or --e2e")
    for name in ("requests", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if not args.seconds:
        raise ValueError("--seconds needs at least one length")
    return Plan(
        scenarios={media: _scenario(args, media) for media in dict.fromkeys(args.media)},
        seconds=tuple(args.seconds),
        loads=loads,
        requests=args.requests,
        repeats=args.repeats,
        warmup=args.warmup,
        level=level,
        seed=args.seed,
        timeout_s=args.timeout,
        search_maximum=args.search,
    )


def _loads(args: argparse.Namespace) -> tuple[Load, ...]:
    closed = args.concurrency
    if closed is None:
        closed = [] if args.rate else [1, 2]
    for name, numbers in (("concurrency", closed), ("rate", args.rate)):
        if any(number <= 0 for number in numbers):
            raise ValueError(f"--{name} must be above 0, got {min(numbers)}")
    if args.burstiness <= 0:
        raise ValueError(f"--burstiness must be above 0, got {args.burstiness}")
    loads = [Load(value=number) for number in closed]
    loads += [
        Load(kind=args.arrivals, value=rate, burstiness=args.burstiness) for rate in args.rate
    ]
    return tuple(loads)


def _scenario(args: argparse.Namespace, media: Media) -> Scenario:
    questions = QUESTIONS
    if args.questions is not None:
        lines = args.questions.read_text(encoding="utf-8").splitlines()
        questions = tuple(line.strip() for line in lines if line.strip())
    repeated = media == "repeated"
    return Scenario(
        clip=ClipShape(args.seconds[0], args.size, args.size, args.fps, not args.silent),
        output_tokens=args.output_tokens,
        questions=questions,
        repeat_media=args.repeat_media if repeated else 0.0,
        repeat_questions=args.repeat_questions if repeated else 0.0,
    )


def server_settings(args: argparse.Namespace, ours: Path, stock: Path) -> ServerSettings:
    """Settings of the servers to start."""
    scenario = _scenario(args, "unique")
    longest = Prompt.of_clip(max(args.seconds), scenario.clip.frame_tokens).full
    needed = longest + args.output_tokens + TEXT_TOKENS
    eager = ("--enforce-eager",) if args.eager else ()
    return ServerSettings(
        ours,
        stock,
        max_model_len=args.max_model_len or -(-needed // 1024) * 1024,
        kv_bytes=int(args.kv_gib * 2**30),
        block_size=args.block_size,
        min_pixels=args.min_pixels,
        extra=(*eager, *args.server_option),
    )
