"""Measure how attacks on a gateway affect other tenants.

    python scripts/flood_gateway.py [--seconds 10] [--only NAME ...] [--write] [--check]

For each attack a gateway with default settings is started in front of mock engines. Another tenant
sends a small text request four times a second, each on a new connection, first without and then
during the attack; health checks run at the same rate. Attacker, engines and measurement are
separate processes. A row of the table has the peak memory of the gateway and the maximum latencies
of `/health` and of the other tenant, whose requests contain a small image in attacks on media.
Attacker and other tenant share an address, as behind a proxy; health checks have another, as a
kubelet's.

`--write` puts the table into `deploy/README.md`; `--check` fails if a goal is missed. An attack is
a coroutine in `floods.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
import yaml
from flood_upstreams import TARPIT_HOST, serve_upstreams
from floods import ATTACKS, Attack, Target, attack_forever, chat, picture

from ep_serve.gateway.keys import new_key

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "deploy" / "README.md"
BEGIN, END = "<!-- floods -->\n", "<!-- end of floods -->\n"
MIB = 2**20
MEMORY_MIB, HEALTH_S = 400, 1.0
PERIOD_S = 0.25
HEALTH_HOST = "127.0.0.3"
CLIENT_TIMEOUT_S = 60.0
START_S = 60.0
QUIET_S = 3.0
SPAWN = multiprocessing.get_context("spawn")
RUN = (
    "import argparse, sys; from ep_serve.gateway.command import add_options, run; "
    "p = argparse.ArgumentParser(); add_options(p); sys.exit(run(p.parse_args()))"
)


@dataclass
class Times:
    """Latencies and errors of one kind of request."""

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def longest(self) -> float:
        return max(self.seconds, default=0.0)


@dataclass
class Row:
    """The results of one attack."""

    name: str
    keyed: bool
    media: bool
    peak_mib: float
    quiet_s: float
    health: Times
    tenant: Times

    def missed(self, slack: float) -> list[str]:
        """Return the missed goals; `slack` adds seconds to the latency goals."""
        found = []
        if self.peak_mib > MEMORY_MIB:
            found.append(f"{self.peak_mib:.0f} MiB")
        if self.health.longest > HEALTH_S + slack or self.health.failed:
            found.append(f"/health {self.health.longest:.2f} s {self.health.failed[:3]}")
        if self.tenant.longest > 2 * self.quiet_s + 1 + slack or self.tenant.failed:
            found.append(f"tenant {self.tenant.longest:.2f} s {self.tenant.failed[:3]}")
        return found

    def __str__(self) -> str:
        tenant = f"{self.tenant.longest:.2f}"
        if self.tenant.failed:
            tenant += f", {len(self.tenant.failed)} failed"
        name, key = self.name + " *" * self.media, "with" if self.keyed else "without"
        return (
            f"| {name} | {key} | {self.peak_mib:.0f} "
            f"| {self.health.longest:.2f} | {self.quiet_s:.2f} | {tenant} |"
        )


HEAD = """\
| Attack | Key | Peak memory, MiB | Longest `/health`, s | Another tenant: quiet, s | attacked, s |
|---|---|---:|---:|---:|---:|
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10, help="how long an attack lasts")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=list(ATTACKS))
    parser.add_argument("--write", action="store_true", help="put the table into deploy/README.md")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument(
        "--slack", type=float, default=0, help="seconds that answers may take beyond the goals"
    )
    parser.add_argument(
        "--per-gateway",
        type=int,
        default=1,
        metavar="N",
        help="attacks on one gateway, which take less time and whose memory adds up",
    )
    given = parser.parse_args()
    if given.write and given.only:
        parser.error("--write requires all attacks")
    rows = uvloop.run(table(given))
    if given.write:
        README.write_text(with_table(README.read_text(), rows, given.seconds))
    return int(given.check and any(row.missed(given.slack) for row in rows))


async def table(given: argparse.Namespace) -> list[Row]:
    """Run the attacks and print a row for each."""
    rows: list[Row] = []
    selected = [attack for name, attack in ATTACKS.items() if name in (given.only or ATTACKS)]
    pairs = [(attack, keyed) for attack in selected for keyed in attack.keys.value]
    print(HEAD, end="", flush=True)
    for first in range(0, len(pairs), given.per_gateway):
        async with start_gateway() as now:
            for attack, keyed in pairs[first : first + given.per_gateway]:
                rows.append(row := await measure_attack(now, attack, keyed, given.seconds))
                print(row, flush=True)
                for missed in row.missed(given.slack):
                    print(f"missed: {row.name}: {missed}", file=sys.stderr, flush=True)
    return rows


@dataclass(frozen=True)
class GatewayUnderTest:
    """A running gateway with mock engines."""

    pid: int
    port: int
    tarpit_port: int
    keys: dict[str, str]
    quiet: dict[bool, Times] = field(default_factory=dict)
    """Latencies of the other tenant without an attack, without and with an image."""


async def measure_attack(sut: GatewayUnderTest, attack: Attack, keyed: bool, seconds: float) -> Row:
    """Run and measure one attack."""
    contents = [picture(n) for n in range(500)] if attack.media else ["Hello"]
    bodies = itertools.cycle([chat(content) for content in contents])
    other = {"authorization": f"Bearer {sut.keys['other']}"}
    if attack.media not in sut.quiet:
        sut.quiet[attack.media] = (await measure_latency(sut.port, other, bodies, QUIET_S))[1]
    quiet = sut.quiet[attack.media]
    started = SPAWN.Event()
    target = Target(sut.port, sut.tarpit_port, sut.keys["attacker"] if keyed else None)
    attacker = SPAWN.Process(
        target=attack_forever, args=(attack.run.__name__, target, started), daemon=True
    )
    attacker.start()
    try:
        await asyncio.to_thread(started.wait)
        health, tenant = await measure_latency(sut.port, other, bodies, seconds)
    finally:
        attacker.kill()
        attacker.join()
    mib = peak_mib(sut.pid)
    return Row(attack.name, keyed, attack.media, mib, quiet.longest, health, tenant)


@asynccontextmanager
async def start_gateway() -> AsyncIterator[GatewayUnderTest]:
    """Run mock engines and a gateway."""
    here, there = SPAWN.Pipe()
    upstreams = SPAWN.Process(target=serve_upstreams, args=(there,), daemon=True)
    upstreams.start()
    try:
        with tempfile.TemporaryDirectory() as folder:
            engines, tarpit = await asyncio.to_thread(here.recv)
            async with gateway(Path(folder), engines, tarpit) as (pid, port, keys):
                yield GatewayUnderTest(pid, port, tarpit, keys)
    finally:
        upstreams.kill()
        upstreams.join()


async def measure_latency(
    port: int, headers: dict[str, str], bodies: Iterator[bytes], seconds: float
) -> tuple[Times, Times]:
    """Measure health checks and requests of another tenant."""
    health, tenant = Times(), Times()
    url = f"http://127.0.0.1:{port}"
    headers = {"content-type": "application/json", **headers}

    async def one(times: Times, method: str, path: str, **more: Any) -> None:
        began = time.monotonic()
        address = (HEALTH_HOST, 0) if times is health else None
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(local_addr=address),
                    timeout=aiohttp.ClientTimeout(CLIENT_TIMEOUT_S),
                ) as session,
                session.request(method, url + path, **more) as answer,
            ):
                text = await answer.text()
            if answer.status != 200:
                times.failed.append(f"{answer.status} {text[:300]}")
        except (aiohttp.ClientError, TimeoutError) as error:
            times.failed.append(type(error).__name__)
        times.seconds.append(time.monotonic() - began)

    end = time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        while time.monotonic() < end:
            tasks.create_task(one(health, "GET", "/health"))
            path = "/v1/chat/completions"
            tasks.create_task(one(tenant, "POST", path, data=next(bodies), headers=headers))
            await asyncio.sleep(PERIOD_S)
    return health, tenant


@asynccontextmanager
async def gateway(
    folder: Path, engines: list[int], tarpit: int
) -> AsyncIterator[tuple[int, int, dict[str, str]]]:
    """Run a gateway; yield its process id, port and the keys of two tenants."""
    made = {name: new_key(name) for name in ("attacker", "other")}
    entries = [yaml.safe_load(entry)["keys"][0] for _, entry in made.values()]
    (folder / "keys.yaml").write_text(yaml.safe_dump({"keys": entries}))
    port = free_port()
    options = {
        "upstreams": [f"http://127.0.0.1:{engine}" for engine in engines],
        "port": port,
        "keys_file": str(folder / "keys.yaml"),
        "store": {"path": str(folder / "store")},
        "metrics": {"port": 0},
        "media": {"fetch": {"ports": [tarpit], "allow_networks": [f"{TARPIT_HOST}/32"]}},
        "log_level": "error",
    }
    (folder / "gateway.yaml").write_text(yaml.safe_dump(options))
    command = [sys.executable, "-c", RUN, "--config", str(folder / "gateway.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environment)
    try:
        async with aiohttp.ClientSession() as session:
            end = time.monotonic() + START_S
            while True:
                with suppress(aiohttp.ClientError):
                    async with session.get(f"http://127.0.0.1:{port}/ready") as answer:
                        if answer.status == 200:
                            break
                if time.monotonic() > end or process.returncode is not None:
                    raise SystemExit("the gateway did not start")
                await asyncio.sleep(0.1)
        yield process.pid, port, {name: key for name, (key, _) in made.items()}
        if process.returncode is not None:
            raise SystemExit(f"the gateway ended with {process.returncode}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def peak_mib(pid: int) -> float:
    """Return the peak resident memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def with_table(text: str, rows: list[Row], seconds: float) -> str:
    """Replace the table in a document."""
    machine = f"{os.cpu_count()} x {platform.machine()}"
    said = f"Attacks of {seconds:g} s, {machine}. With * the other tenant sends a picture:\n\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    table = "".join(f"{row}\n" for row in rows)
    return f"{before}{BEGIN}{said}{HEAD}{table}{END}{after}"


if __name__ == "__main__":
    raise SystemExit(main())
