"""What the gateway adds to an answer, and how much it carries, beside other proxies.

    python scripts/bench_gateway.py [--litellm BIN] [--vllm-router BIN] [--json FILE]

A mock engine in a process of its own streams tokens at a fixed rate. For each number of streams the
targets (the engine itself, the gateway, other proxies whose programs are given) take turns, round
after round, so that whatever else the machine does touches all of them. Workers begin spread over
the length of a stream. `added` is the difference to the engine itself at the same percentile. The
last table is a race: the engine sends as fast as it can.

Other proxies belong into environments of their own: `pip install 'litellm[proxy]'`,
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

ROOT = Path(__file__).resolve().parents[1]
BODY = {"model": "mock", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
KEY = f"sk-{secrets.token_hex(32)}"
"""LiteLLM does not start without one; the others ignore it."""
HEADERS = {"authorization": f"Bearer {KEY}"}
TOKENS, INTERVAL_S = 40, 0.025
STREAMS = (1, 64, 256)
START_S = 60.0


@dataclass
class Result:
    """What was measured for one target."""

    first: list[float] = field(default_factory=list)
    """Seconds until the first event of each stream."""
    events: int = 0
    seconds: float = 0.0
    failed: int = 0

    def quantile(self, share: float) -> float:
        """Milliseconds."""
        ordered = sorted(self.first)
        if not ordered:
            return float("nan")
        return 1_000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--litellm", help="LiteLLM's program")
    parser.add_argument("--vllm-router", help="vllm-router's program, or 'PYTHON -m module'")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args()
    report: dict[str, Any] = {"machine": f"{os.cpu_count()} x {platform.machine()}"}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, interval in (("fixed rate", INTERVAL_S), ("race", 0.0)):
            async with targets(given, folder, interval) as urls:
                for streams in STREAMS:
                    results = await measure(urls, streams, given.rounds, interval)
                    report[f"{name}, {streams} streams"] = shown(name, streams, results)
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n")


def shown(name: str, streams: int, results: dict[str, Result]) -> dict[str, Any]:
    """Print a table and give its numbers."""
    print(f"\n{name}, {streams} streams")
    print(f"{'':14}{'p50 ms':>9}{'p99 ms':>9}{'added p50':>11}{'added p99':>11}{'tokens/s':>10}")
    rows = {}
    direct = results["engine"]
    for target, result in results.items():
        p50, p99 = result.quantile(0.5), result.quantile(0.99)
        more = p50 - direct.quantile(0.5), p99 - direct.quantile(0.99)
        rate = result.events / result.seconds
        failed = f"  {result.failed} FAILED" if result.failed else ""
        print(f"{target:14}{p50:9.2f}{p99:9.2f}{more[0]:11.2f}{more[1]:11.2f}{rate:10.0f}{failed}")
        rows[target] = {
            "p50_ms": p50,
            "p99_ms": p99,
            "added_p50_ms": more[0],
            "added_p99_ms": more[1],
            "tokens_per_s": rate,
            "samples": len(result.first),
            "failed": result.failed,
        }
    return rows


# -- load ---------------------------------------------------------------------------------------


async def measure(
    urls: dict[str, str], streams: int, rounds: int, interval: float
) -> dict[str, Result]:
    """Let the targets take turns; each worker sends one stream after the other."""
    results = {target: Result() for target in urls}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers=HEADERS) as session:
        each = 1 if streams > 1 else 5
        length = TOKENS * interval
        for round_ in range(rounds + 1):
            for target, url in urls.items():
                result = Result() if round_ == 0 else results[target]  # the first one warms up
                began = time.perf_counter()
                await asyncio.gather(
                    *(
                        worker(session, url, result, each + 1, length * number / streams)
                        for number in range(streams)
                    )
                )
                result.seconds += time.perf_counter() - began
    return results


async def worker(
    session: aiohttp.ClientSession, url: str, result: Result, requests: int, delay: float
) -> None:
    await asyncio.sleep(delay)
    for _ in range(requests):
        began = time.perf_counter()
        events = 0
        try:
            async with session.post(f"{url}/v1/chat/completions", json=BODY) as answer:
                async for data in answer.content.iter_any():
                    if not events and b"data:" in data and answer.status == 200:
                        result.first.append(time.perf_counter() - began)
                    events += data.count(b'"content":"t')
        except aiohttp.ClientError:
            pass
        result.events += events
        result.failed += events != TOKENS


# -- targets ------------------------------------------------------------------------------------


@asynccontextmanager
async def targets(
    given: argparse.Namespace, folder: Path, interval: float
) -> AsyncIterator[dict[str, str]]:
    """Start everything, one process each; the URLs by name."""
    async with AsyncExitStack() as stack:

        async def start(command: list[str], port: int) -> str:
            await stack.enter_async_context(process(command, folder))
            return await answering(f"http://127.0.0.1:{port}")

        port = free_port()
        mock = [sys.executable, "-m", "tests.gateway.mock_upstream", str(port)]
        mock += ["--tokens", str(TOKENS), "--interval", str(interval)]
        engine = await start(mock, port)
        urls = {"engine": engine}
        for name, make in (
            ("gateway", lambda port: gateway(engine, port, folder)),
            ("litellm", lambda port: litellm(given.litellm, engine, port, folder)),
            ("vllm-router", lambda port: vllm_router(given.vllm_router, engine, port)),
        ):
            maker: Callable[[int], list[str]] = make
            if name == "gateway" or getattr(given, name.replace("-", "_")):
                port = free_port()
                urls[name] = await start(maker(port), port)
        yield urls


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
    # Its own port for metrics would collide in the second round.
    options += ["--port", str(port), "--prometheus-port", str(free_port())]
    return [*program.split(), *options]


@asynccontextmanager
async def process(command: list[str], folder: Path) -> AsyncIterator[None]:
    log = folder / f"{Path(command[0]).name}-{free_port()}.log"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        started = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=output, cwd=ROOT, env=environment
        )
        try:
            yield
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


async def answering(url: str) -> str:
    """Wait until a target answers a chat request."""
    end = time.monotonic() + START_S
    async with aiohttp.ClientSession(headers=HEADERS) as session:
        while time.monotonic() < end:
            try:
                async with session.post(f"{url}/v1/chat/completions", json=BODY) as answer:
                    await answer.read()
                    if answer.status == 200:
                        return url
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.25)
    raise SystemExit(f"{url} does not answer")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


if __name__ == "__main__":
    uvloop.run(main())
