"""`python -m loadtest run`: checkpoints, servers, rounds, report."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import urllib.request
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtest import aiperf, report
from loadtest.campaign import Campaign, utc_now
from loadtest.machine import machine, versions
from loadtest.options import FOLDER, Setup, server_settings
from loadtest.progress import Progress
from loadtest.records import Answer, Bounds, Report, TargetRecord
from loadtest.scenario import derive, plan, prepare
from loadtest.shapes import ModelShape, Prompt, bound
from loadtest.targets import MODEL, OWN_SIEVE, RunningServer, ServerSettings, Target, start_servers

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def run(args: argparse.Namespace, words: list[str]) -> int:
    """Run one load test; returns 0 if it was completed.

    Args:
        args: parsed options.
        words: the command line, for the report.

    Raises:
        ValueError, OSError: an option is invalid.
        ServerError: a server did not start.
    """
    setup = Setup.from_args(args)
    folder = args.out or FOLDER / "reports" / f"{datetime.now(UTC):%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(total=setup.plan.steps(len(setup.targets)))
    if args.generator == "aiperf":
        return write_aiperf(setup, folder, progress, args.checkpoint)
    record = new_report(setup, words)
    campaign = Campaign(setup.plan, record, folder / report.JSON_NAME, progress)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if setup.url is not None:
            served = remote(setup)
            _add_targets(record, setup.targets, {"remote": served})
            campaign.measure(setup.targets, {"remote": served})
        else:
            settings = checkpoints(args, setup, progress)
            _measure_started(campaign, setup, settings, folder, apart=args.apart)
        record.finished = utc_now()
    except KeyboardInterrupt:
        progress.print_line("interrupted; writing the report of the measurements so far")
    _finish_report(record, setup, folder)
    return 0 if record.finished else INTERRUPTED


def _measure_started(
    campaign: Campaign, setup: Setup, settings: ServerSettings, folder: Path, *, apart: bool
) -> None:
    """Start the servers, together or one at a time, and measure."""
    names = dict.fromkeys(target.server for target in setup.targets)
    groups = [[t for t in setup.targets if t.server == name] for name in names]
    for group in groups if apart else [setup.targets]:
        with ExitStack() as stack:
            servers = start_servers(stack, group, settings, folder, campaign.progress.show_status)
            _add_targets(campaign.report, group, servers)
            campaign.progress.print_line(f"ready: {', '.join(servers)}")
            campaign.measure(group, servers)
            campaign.progress.show_status("stopping servers")


def _finish_report(record: Report, setup: Setup, folder: Path) -> None:
    if setup.shape is not None:
        record.bounds = bounds(record, setup.shape, setup)
    if note := prompt_length_note(record):
        record.notes.append(note)
    page = report.write(record, folder)
    print(f"\n{report.text(record)}\n\n{page}")


def new_report(setup: Setup, words: list[str]) -> Report:
    """A report without runs."""
    scenarios: dict[str, Any] = {
        media: asdict(scenario) for media, scenario in setup.plan.scenarios.items()
    }
    return Report(
        command=shlex.join(["python", "-m", "loadtest", *words]),
        started=utc_now(),
        seed=setup.plan.seed,
        machine=machine(),
        versions=versions(),
        scenario={
            **scenarios,
            "seconds": setup.plan.seconds,
            "shape": asdict(setup.shape) if setup.shape else None,
            "warmup": setup.plan.warmup,
        },
        level=asdict(setup.plan.level),
        baseline=setup.baseline,
    )


def _add_targets(record: Report, targets: list[Target], servers: dict[str, RunningServer]) -> None:
    for target in targets:
        served = servers[target.server]
        record.targets.append(
            TargetRecord(
                name=target.name,
                command=served.command or served.url,
                start_s=served.start_s,
                body=target.fields,
            )
        )


def remote(setup: Setup) -> RunningServer:
    """The server at `--url`."""
    assert setup.url is not None
    model = setup.model
    if model is None:
        request = urllib.request.Request(f"{setup.url}/models", headers=setup.headers)
        with urllib.request.urlopen(request, timeout=30) as response:
            model = str(json.load(response)["data"][0]["id"])
    return RunningServer(setup.url, model, headers=setup.headers)


def checkpoints(args: argparse.Namespace, setup: Setup, progress: Progress) -> ServerSettings:
    """Build the checkpoints, or use the given ones.

    Raises:
        ValueError: a target needs a stock checkpoint and none was given.
    """
    if args.checkpoint is not None:
        own = {OWN_SIEVE}
        if args.stock_checkpoint is None and {t.server for t in setup.targets} - own:
            raise ValueError("--checkpoint needs --stock-checkpoint for the targets beside ratios")
        return server_settings(args, args.checkpoint, args.stock_checkpoint or args.checkpoint)
    from transformers.utils import logging

    from loadtest.reference import build

    logging.set_verbosity_error()  # warnings about the missing speech output
    assert setup.shape is not None
    dummy = "dummy" in args.server_option or "--load-format=dummy" in args.server_option
    folder = FOLDER / (f"{args.shape}-dummy" if dummy else args.shape)
    ours, stock = build(
        folder, setup.shape, weights=not dummy, progress=lambda text: progress.show_status(text)
    )
    return server_settings(args, ours, stock)


def bounds(record: Report, shape: ModelShape, setup: Setup) -> list[Bounds]:
    """Analytical bounds of each target with reduction, for the prompts that were sent."""
    found = []
    for target in setup.targets:
        if not target.is_reducing or target.keep_ratio is None:
            continue
        # The cost of sieves without a refiner is negligible.
        model = shape if target.sieve is None else replace(shape, refiner_layers=0)
        for seconds in setup.plan.seconds:
            prompt = _prompt(record, setup, seconds)
            limit = bound(model, prompt, target.keep_ratio)
            found.append(
                Bounds(
                    target=target.name,
                    seconds=seconds,
                    first_token=limit.first_token,
                    request=limit.request,
                    kv=limit.kv,
                )
            )
    return found


def _prompt(record: Report, setup: Setup, seconds: float) -> Prompt:
    """The prompt as the engine counted it, or as the clip lets expect it."""
    scenario = next(iter(setup.plan.scenarios.values()))
    clip = scenario.clip
    expected = Prompt.of_clip(seconds, clip.frame_tokens, sound=clip.sound)
    expected = replace(expected, output=scenario.output_tokens)
    for answer in _answers(record, seconds):
        if answer.reduction is not None:
            counted = answer.reduction
            return replace(
                expected,
                video=counted["video"]["full"] + counted["image"]["full"],
                audio=counted["audio"]["full"],
                text=counted["prompt_tokens_full"] - counted["av_tokens_full"],
            )
    return expected


def prompt_length_note(record: Report) -> str | None:
    """A note if stock vLLM and this engine count different prompt lengths."""
    for seconds in sorted({run.seconds for run in record.runs}):
        stock = [a.prompt_tokens for a in _answers(record, seconds, "stock") if a.prompt_tokens]
        ours = [a.reduction["prompt_tokens_full"] for a in _answers(record, seconds) if a.reduction]
        if stock and ours and abs(_mean(stock) - _mean(ours)) > 0.01 * _mean(ours):
            return (
                f"Prompts differ: clips of {seconds:g} s are {_mean(stock):.0f} tokens to stock "
                f"vLLM and {_mean(ours):.0f} to this engine before reduction. The gains are not "
                "those of the reduction alone; choose a --size that no processor resizes."
            )
    return None


def _answers(record: Report, seconds: float, target: str | None = None) -> list[Answer]:
    return [
        answer
        for run in record.runs
        if run.seconds == seconds and target in (None, run.target)
        for answer in run.answers
    ]


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


def write_aiperf(setup: Setup, folder: Path, progress: Progress, tokenizer: Path | None) -> int:
    """Write the requests of the first round and AIPerf's command lines."""
    url = setup.url or "http://localhost:8000/v1"
    model = setup.model or MODEL
    lines = ["#!/bin/sh", "# In a separate environment: pip install 'aiperf==0.13.*'", "set -e"]
    for media, scenario in setup.plan.scenarios.items():
        for seconds in setup.plan.seconds:
            clip = replace(scenario.clip, seconds=seconds)
            for load in setup.plan.loads:
                for target in setup.targets:
                    seed = derive(setup.plan.seed, target.name, media, seconds, load.label, 0)
                    name = f"{target.name}-{media}-{seconds:g}s-{load.label}".replace("/", "_per_")
                    path = folder / f"{name.replace(' ', '-')}.jsonl"
                    planned = plan(scenario, setup.plan.count(load), seed)
                    requests = prepare(replace(scenario, clip=clip), planned, model, target.fields)
                    count = aiperf.write_payloads(path, requests)
                    artifacts = path.with_suffix("")
                    command = aiperf.command(
                        path, url, model, load, count, seed, artifacts, tokenizer
                    )
                    lines.append(command)
                    progress.step(f"{path}: {count} requests")
    script = folder / "aiperf.sh"
    script.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"start a server that serves {model!r} at {url}, then: sh {script}", file=sys.stdout)
    return 0
