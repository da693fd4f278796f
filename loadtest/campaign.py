"""Run a load test: rounds over targets and loads, saved to a report after every run.

Targets alternate in every round, so that other load on the machine affects all of them. Every run
has its own clips, so that caches do not carry over between runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from loadtest import search
from loadtest.driver import Driver, Recording
from loadtest.measures import ServiceLevel, figures
from loadtest.monitor import Monitor
from loadtest.progress import Progress
from loadtest.records import Answer, Load, Probe, Report, Run, Search
from loadtest.scenario import Request, Scenario, arrivals, derive, plan, prepare
from loadtest.targets import RunningServer, Target

Media = Literal["unique", "repeated"]


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Plan:
    """The measurements of every target.

    Attributes:
        scenarios: by the kind of media; those with repeated media are never mixed with the others.
        seconds: lengths of clips.
        loads: closed loops and rates.
        requests: in a run; at least twice the concurrency of a closed loop.
        repeats: rounds.
        warmup: requests to each target and length before anything is measured.
        level: service level of goodput and of the search.
        timeout_s: of one request.
        search_maximum: where the search for the largest concurrency ends; 0 for no search.
    """

    scenarios: dict[Media, Scenario]
    seconds: tuple[float, ...]
    loads: tuple[Load, ...]
    requests: int
    repeats: int
    warmup: int
    level: ServiceLevel
    seed: int
    timeout_s: float = 600.0
    search_maximum: int = 0

    def count(self, load: Load) -> int:
        """Requests of a run at this load."""
        return max(self.requests, 2 * int(load.value)) if load.kind == "closed" else self.requests

    def steps(self, targets: int) -> int:
        """Runs in all."""
        return targets * len(self.scenarios) * len(self.seconds) * len(self.loads) * self.repeats


@dataclass
class Campaign:
    """Runs a plan; `path` holds a valid report after every run.

    Attributes:
        plan: what to run.
        report: runs are appended to it.
        path: of the report's JSON file.
    """

    plan: Plan
    report: Report
    path: Path
    progress: Progress = field(default_factory=Progress)

    def measure(self, targets: Sequence[Target], servers: dict[str, RunningServer]) -> None:
        """Warm up, then run every load on every target, `repeats` times.

        Raises:
            KeyboardInterrupt: the report holds what was measured until then.
        """
        for target in targets:
            self._warm_up(target, servers[target.server])
        for repeat in range(self.plan.repeats):
            for media, seconds, load in self._cells():
                order = targets if repeat % 2 == 0 else targets[::-1]
                for target in order:
                    run = self._run(target, servers[target.server], media, seconds, load, repeat)
                    self.progress.step(summary_line(run))
        if self.plan.search_maximum:
            for target in targets:
                for seconds in self.plan.seconds:
                    self._search(target, servers[target.server], seconds)

    def _cells(self) -> Iterator[tuple[Media, float, Load]]:
        for media in self.plan.scenarios:
            for seconds in self.plan.seconds:
                for load in self.plan.loads:
                    yield media, seconds, load

    def _scenario(self, media: Media, seconds: float) -> Scenario:
        scenario = self.plan.scenarios[media]
        return replace(scenario, clip=replace(scenario.clip, seconds=seconds))

    def _warm_up(self, target: Target, served: RunningServer) -> None:
        media = next(iter(self.plan.scenarios))
        for seconds in self.plan.seconds:
            self.progress.show_status(f"warming up {target.name}, clips of {seconds:g} s")
            seed = derive(self.plan.seed, "warm-up", target.name, seconds)
            scenario = replace(self._scenario(media, seconds), repeat_media=0.0)
            requests = self._requests(target, served, scenario, self.plan.warmup, seed)
            recording = Recording()
            driver = self._driver(served, scenario)
            asyncio.run(driver.closed(requests, 1, recording))
            failed = [a for a in recording.answers if a.status != "ok"]
            if failed:
                self._add_note(
                    f"{target.name}: {len(failed)} of {len(recording.answers)} warm-up requests "
                    f"failed ({failed[0].error or failed[0].status})"
                )

    def _add_note(self, text: str) -> None:
        self.progress.print_line(f"note: {text}")
        self.report.notes.append(text)

    def _requests(
        self, target: Target, served: RunningServer, scenario: Scenario, count: int, seed: int
    ) -> list[Request]:
        planned = plan(scenario, count, seed)
        requests = []
        for request in prepare(scenario, planned, served.model, target.fields):
            requests.append(request)
            self.progress.show_status(f"{target.name}: making requests, {len(requests)}/{count}")
        return requests

    def _driver(self, served: RunningServer, scenario: Scenario) -> Driver:
        return Driver(
            served.chat_url,
            timeout_s=self.plan.timeout_s,
            output_tokens=scenario.output_tokens,
            headers=served.headers,
        )

    def _run(
        self,
        target: Target,
        served: RunningServer,
        media: Media,
        seconds: float,
        load: Load,
        repeat: int,
    ) -> Run:
        run = Run(
            target=target.name,
            media=media,
            seconds=seconds,
            load=load,
            repeat=repeat,
            started=utc_now(),
        )
        seed = derive(self.plan.seed, target.name, media, seconds, load.label, repeat)
        scenario = self._scenario(media, seconds)
        requests = self._requests(target, served, scenario, self.plan.count(load), seed)
        self.report.runs.append(run)
        run.interrupted = True
        try:
            self.execute(run, served, scenario, requests, seed)
            run.interrupted = False
        finally:
            run.figures = figures(run, self.plan.level)
            self.report.save(self.path)
        return run

    def execute(
        self,
        run: Run,
        served: RunningServer,
        scenario: Scenario,
        requests: Sequence[Request],
        seed: int,
    ) -> None:
        """Send `requests` and record answers and metrics in `run`, also if interrupted."""
        recording = Recording(answers=run.answers)
        monitor = Monitor(served.metrics_url, served.pid, recording.now, headers=served.headers)
        label = f"{run.target} {run.media} {run.seconds:g} s {run.load.label} #{run.repeat + 1}"

        def ended(answer: Answer) -> None:
            done = sum(a.status != "cut" for a in recording.answers)
            self.progress.show_status(f"{label}: {done}/{len(requests)} answered")

        driver = replace(
            self._driver(served, scenario),
            on_first=lambda answer: monitor.sample_now(),
            on_end=ended,
        )
        times = arrivals(run.load, len(requests), seed)

        async def drive() -> None:
            async with monitor:
                if times is None:
                    await driver.closed(requests, int(run.load.value), recording)
                else:
                    await driver.open(requests, times, recording)

        self.progress.show_status(f"{label}: 0/{len(requests)} answered")
        try:
            asyncio.run(drive())
        finally:
            run.wall_s = recording.wall_s
            run.samples, run.counters = monitor.samples, monitor.counters
            run.kv_blocks, run.block_size = monitor.kv_blocks, monitor.block_size

    def _search(self, target: Target, served: RunningServer, seconds: float) -> None:
        def probe(concurrency: int) -> Probe:
            load = Load(value=concurrency)
            run = Run(
                target=target.name,
                media="unique",
                seconds=seconds,
                load=load,
                repeat=0,
                started=utc_now(),
            )
            seed = derive(self.plan.seed, "search", target.name, seconds, concurrency)
            scenario = replace(self._scenario(media, seconds), repeat_media=0.0)
            requests = self._requests(target, served, scenario, self.plan.count(load), seed)
            self.execute(run, served, scenario, requests, seed)
            attained = self.plan.level.attained(run.answers)
            return Probe(
                concurrency=concurrency,
                met=attained >= self.plan.level.attain,
                attained=attained,
            )

        media = next(iter(self.plan.scenarios))
        found, probes = search.largest(probe, self.plan.search_maximum)
        self.report.searches.append(
            Search(target=target.name, seconds=seconds, largest=found, probes=probes)
        )
        self.report.save(self.path)
        self.progress.print_line(
            f"{target.name}: meets the service level up to concurrency {found}"
        )


def summary_line(run: Run) -> str:
    """One line about a run."""
    ttft = run.figures["ttft_s"]
    first = f"first token {ttft['p50']:.2f} s" if ttft else "no first token"
    bad = run.figures["requests"] - run.figures["whole"]
    return (
        f"{run.target:>12} {run.media} {run.seconds:g} s {run.load.label} #{run.repeat + 1}: "
        f"{first}, {run.figures['requests_per_s']:.3f} requests/s"
        + (f", {bad} NOT WHOLE" if bad else "")
    )
