"""Compare latency and throughput of the gateway with other proxies.

    python scripts/bench_gateway.py [--litellm BIN] [--vllm-router BIN] [--json FILE]

A mock engine in a separate process streams tokens at a fixed rate. For each number of streams the
targets (the engine itself, the gateway, other proxies) are measured in interleaved rounds, so that
other load on the machine affects all of them; results are medians over the rounds. The streams of a
round start at times spread over the duration of an answer, and each worker repeats its request on a
fixed schedule with 5 % pause: a target that keeps up has the throughput of the engine. Only tokens
inside a window in which all streams run are counted.

`added` is the difference to the engine at the same percentile. The last columns are CPU time per
token that reached a client, of the target and of everything else (the mock engine and the load
generator); together they show whether the machine is the limit. The tables `race` measure maximum
throughput: the engine sends tokens without pause, and workers repeat requests at once.

Install other proxies in separate environments: `pip install 'litellm[proxy]'`,
`pip install vllm-router`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import secrets
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
import yaml
from stream_load import Round, load, median, quantile

ROOT = Path(__file__).resolve().parents[1]
BODY = {"model": "mock", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
KEY = f"sk-{secrets.token_hex(32)}"
"""LiteLLM does not start without one; the others ignore it."""
HEADERS = {"authorization": f"Bearer {KEY}"}
TOKENS, INTERVAL_S, PAUSE = 40, 0.025, 0.05
STREAMS = (1, 64, 256)
START_S = 60.0
FEW = 100
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Target:
    """A measured target and its rounds."""

    port: int
    pid: int
    rounds: list[Round] = field(default_factory=list)
    own_cpu: float = 0.0
    """CPU seconds of its processes."""
    other_cpu: float = 0.0
    """CPU seconds of the mock engine and the load generator."""

    def quantile(self, share: float) -> float:
        """Return a latency quantile in milliseconds; rounds with few answers are merged."""
        if min(len(round_.first) for round_ in self.rounds) < FEW:
            return quantile([one for round_ in self.rounds for one in round_.first], share)
        return median([quantile(round_.first, share) for round_ in self.rounds])

    @property
    def rate(self) -> float:
        return median([round_.rate for round_ in self.rounds])


Targets = dict[str, Target]


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--litellm", help="LiteLLM's program")
    parser.add_argument("--vllm-router", help="vllm-router's program, or 'PYTHON -m module'")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.1, help="length of a round's window")
    parser.add_argument("--streams", type=int, nargs="+", default=STREAMS)
    parser.add_argument("--only", choices=["fixed rate", "race"], help="one of the two parts")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args()
    report: dict[str, Any] = {"machine": f"{os.cpu_count()} x {platform.machine()}"}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, interval in (("fixed rate", INTERVAL_S), ("race", 0.0)):
            if given.only in (None, name):
                async with targets(given, folder, interval) as found:
                    for streams in given.streams:
                        await measure(found, streams, interval, given)
                        report[f"{name}, {streams} streams"] = report_table(name, streams, found)
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n")


def report_table(name: str, streams: int, found: Targets) -> dict[str, Any]:
    """Print a table and return its numbers."""
    print(f"\n{name}, {streams} streams")
    print(f"{'':12}{'p50 ms':>8}{'p99 ms':>8}{'added p50':>11}{'added p99':>11}", end="")
    print(f"{'tokens/s':>10}{'us/token':>10}{'others':>8}", flush=True)
    rows = {}
    direct = found["engine"]
    for target, result in found.items():
        p50, p99 = result.quantile(0.5), result.quantile(0.99)
        more = p50 - direct.quantile(0.5), p99 - direct.quantile(0.99)
        tokens = sum(round_.tokens for round_ in result.rounds) or 1
        own, other = 1e6 * result.own_cpu / tokens, 1e6 * result.other_cpu / tokens
        failed = sum(round_.failed for round_ in result.rounds)
        print(f"{target:12}{p50:8.2f}{p99:8.2f}{more[0]:11.2f}{more[1]:11.2f}", end="")
        print(f"{result.rate:10.0f}{own:10.1f}{other:8.1f}", end="")
        print(f"  {failed} FAILED" if failed else "", flush=True)
        rows[target] = {
            "p50_ms": p50,
            "p99_ms": p99,
            "added_p50_ms": more[0],
            "added_p99_ms": more[1],
            "tokens_per_s": result.rate,
            "cpu_us_per_token": own,
            "other_cpu_us_per_token": other,
            "samples": sum(len(round_.first) for round_ in result.rounds),
            "failed": failed,
        }
    return rows


async def measure(found: Targets, streams: int, interval: float, given: argparse.Namespace) -> None:
    """Measure the targets in interleaved rounds."""
    period = (1 + PAUSE) * TOKENS * interval
    for target in found.values():
        target.rounds, target.own_cpu, target.other_cpu = [], 0.0, 0.0
    others = {os.getpid(), found["engine"].pid}
    for number in range(given.rounds + 1):
        for target in found.values():
            own = {target.pid} - others
            before = [sum(map(cpu_seconds, pids)) for pids in (own, others)]
            window = (max(0.5, period), given.seconds if number else 0.5)
            round_ = await load(target.port, BODY, KEY, streams, TOKENS, window, period)
            if number == 0:  # the first one warms up
                continue
            after = [sum(map(cpu_seconds, pids)) for pids in (own, others)]
            # Before and after the window there is work too: at the mean rate of the window.
            share = round_.share
            target.own_cpu += share * (after[0] - before[0])
            target.other_cpu += share * (after[1] - before[1])
            target.rounds.append(round_)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its children."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        tasks = Path(f"/proc/{pid}/task").iterdir()
        children = [int(c) for task in tasks for c in (task / "children").read_text().split()]
    except OSError:  # it has just ended
        return 0.0
    return (int(stat[11]) + int(stat[12])) / TICKS + sum(map(cpu_seconds, children))


# -- targets ------------------------------------------------------------------------------------


@asynccontextmanager
async def targets(
    given: argparse.Namespace, folder: Path, interval: float
) -> AsyncIterator[Targets]:
    """Start all targets and yield them by name."""
    async with AsyncExitStack() as stack:

        async def start(command: list[str], port: int) -> Target:
            pid = await stack.enter_async_context(process(command, folder))
            await answering(f"http://127.0.0.1:{port}")
            return Target(port, pid)

        port = free_port()
        mock = [sys.executable, str(ROOT / "scripts" / "mock_engine.py"), str(port)]
        mock += ["--tokens", str(TOKENS), "--interval", str(interval)]
        found = {"engine": await start(mock, port)}
        engine = f"http://127.0.0.1:{port}"
        for name, make in (
            ("gateway", lambda port: gateway(engine, port, folder)),
            ("litellm", lambda port: litellm(given.litellm, engine, port, folder)),
            ("vllm-router", lambda port: vllm_router(given.vllm_router, engine, port)),
        ):
            maker: Callable[[int], list[str]] = make
            if name == "gateway" or getattr(given, name.replace("-", "_")):
                port = free_port()
                found[name] = await start(maker(port), port)
        yield found


def gateway(engine: str, port: int, folder: Path) -> list[str]:
    config = folder / "gateway.yaml"
    options = {
        "upstreams": [engine],
        "port": port,
        "store": {"path": str(folder / f"store-{port}")},
        "metrics": {"port": 0},
        "drain": {"delay_s": 0},
        "routing": {"concurrency": 1_000},
    }
    config.write_text(yaml.safe_dump(options))
    code = (
        "import argparse, sys; from ep_serve.gateway.command import add_options, run; "
        "p = argparse.ArgumentParser(); add_options(p); sys.exit(run(p.parse_args()))"
    )
    return [sys.executable, "-c", code, "--config", str(config)]


def litellm(program: str, engine: str, port: int, folder: Path) -> list[str]:
    config = folder / "litellm.yaml"
    parameters = {"model": "openai/mock", "api_base": f"{engine}/v1", "api_key": "none"}
    options = {
        "model_list": [{"model_name": "mock", "litellm_params": parameters}],
        "general_settings": {"master_key": KEY},
    }
    config.write_text(yaml.safe_dump(options))
    return [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]


def vllm_router(program: str, engine: str, port: int) -> list[str]:
    options = ["--worker-urls", engine, "--policy", "round_robin", "--host", "127.0.0.1"]
    # The default metrics port would collide in the second part.
    options += ["--port", str(port), "--prometheus-port", str(free_port())]
    return [*program.split(), *options]


@asynccontextmanager
async def process(command: list[str], folder: Path) -> AsyncIterator[int]:
    log = folder / f"{Path(command[0]).name}-{free_port()}.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        started = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=output, cwd=ROOT, env=environment
        )
        try:
            yield started.pid
        finally:
            if started.returncode is None:
                started.send_signal(signal.SIGTERM)
                try:
                    await asyncio.wait_for(started.wait(), 10)
                except TimeoutError:
                    started.kill()
                    await started.wait()
            elif started.returncode:
                print(log.read_text()[-2_000:], file=sys.stderr)


async def answering(url: str) -> None:
    """Wait until a target answers a chat request."""
    end = time.monotonic() + START_S
    async with aiohttp.ClientSession(headers=HEADERS) as session:
        while time.monotonic() < end:
            try:
                async with session.post(f"{url}/v1/chat/completions", json=BODY) as answer:
                    await answer.read()
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.25)
    raise SystemExit(f"{url} does not respond")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


if __name__ == "__main__":
    uvloop.run(main())
