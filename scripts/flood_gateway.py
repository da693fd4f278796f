"""Attack a gateway in every way we know, and see what it costs others.

    python scripts/flood_gateway.py [--seconds 10] [--only NAME ...] [--write] [--check]

For each attack a gateway with its default settings is started in front of mock engines. Another
tenant sends a small text request four times a second, each on a connection of its own, first while
nothing else happens and then during the attack; a health check does the same. Attacker, engines and
measurement are processes of their own. A row of the table has the peak memory of the gateway's
process, the longest time to `/health`, and the longest time to an answer for the other tenant.

`--write` puts the table into `deploy/README.md`; `--check` fails if a goal is missed. An attack is
a coroutine in `floods.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
import yaml
from floods import ATTACKS, TARPIT_HOST, Attack, Target, attack_forever, serve_world

from ep_serve.gateway.keys import new_key

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "deploy" / "README.md"
BEGIN, END = "<!-- floods -->\n", "<!-- end of floods -->\n"
MIB = 2**20
MEMORY_MIB, HEALTH_S = 400, 1.0
PERIOD_S = 0.25
PATIENCE_S = 60.0
START_S = 60.0
QUIET_S = 3.0
ATTACKER_START_S = 1.0
RUN = (
    "import argparse, sys; from ep_serve.gateway.command import add_options, run; "
    "p = argparse.ArgumentParser(); add_options(p); sys.exit(run(p.parse_args()))"
)


@dataclass
class Times:
    """How long the answers to one kind of request took."""

    seconds: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def longest(self) -> float:
        return max(self.seconds, default=0.0)


@dataclass
class Row:
    """What an attack did."""

    name: str
    keyed: bool
    peak_mib: float
    quiet_s: float
    health: Times
    tenant: Times

    @property
    def missed(self) -> list[str]:
        """Goals that it misses."""
        found = []
        if self.peak_mib > MEMORY_MIB:
            found.append(f"{self.peak_mib:.0f} MiB")
        if self.health.longest > HEALTH_S or self.health.failed:
            found.append(f"/health {self.health.longest:.2f} s {self.health.failed[:3]}")
        if self.tenant.longest > 2 * self.quiet_s + 1 or self.tenant.failed:
            found.append(f"tenant {self.tenant.longest:.2f} s {self.tenant.failed[:3]}")
        return found

    def __str__(self) -> str:
        tenant = f"{self.tenant.longest:.2f}"
        if self.tenant.failed:
            tenant += f", {len(self.tenant.failed)} failed"
        return (
            f"| {self.name} | {'with' if self.keyed else 'without'} | {self.peak_mib:.0f} "
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
    given = parser.parse_args()
    chosen = [
        (attack, keyed)
        for name, attack in ATTACKS.items()
        if given.only is None or name in given.only
        for keyed in attack.keys.value
    ]
    rows = []
    print(HEAD, end="", flush=True)
    for attack, keyed in chosen:
        row = uvloop.run(attacked(attack, keyed, given.seconds))
        print(row, flush=True)
        for missed in row.missed:
            print(f"missed: {row.name}: {missed}", file=sys.stderr, flush=True)
        rows.append(row)
    if given.write:
        written = with_table(README.read_text(), rows, given.seconds)
        README.write_text(written)
    return int(given.check and any(row.missed for row in rows))


async def attacked(attack: Attack, keyed: bool, seconds: float) -> Row:
    """Start everything, and measure one attack."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        here, there = spawn.Pipe()
        world = spawn.Process(target=serve_world, args=(there,), daemon=True)
        world.start()
        try:
            engines, tarpit = await asyncio.to_thread(here.recv)
            async with gateway(Path(name), engines, tarpit) as (pid, port, keys):
                target = Target(port, tarpit, keys["attacker"] if keyed else None)
                other = {"authorization": f"Bearer {keys['other']}"}
                _, quiet = await watched(port, other, min(seconds, QUIET_S))
                attacker = spawn.Process(
                    target=attack_forever, args=(attack.run.__name__, target), daemon=True
                )
                attacker.start()
                try:
                    await asyncio.sleep(ATTACKER_START_S)
                    health, tenant = await watched(port, other, seconds)
                finally:
                    attacker.kill()
                    attacker.join()
                return Row(attack.name, keyed, peak_mib(pid), quiet.longest, health, tenant)
        finally:
            world.kill()
            world.join()


async def watched(port: int, headers: dict[str, str], seconds: float) -> tuple[Times, Times]:
    """Times of health checks and of small text requests of another tenant."""
    health, tenant = Times(), Times()
    url = f"http://127.0.0.1:{port}"
    body = {"model": "mock", "messages": [{"role": "user", "content": "Hello"}]}

    async def one(times: Times, method: str, path: str, **more: Any) -> None:
        began = time.monotonic()
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(PATIENCE_S)) as session,
                session.request(method, url + path, **more) as answer,
            ):
                await answer.read()
            if answer.status != 200:
                times.failed.append(str(answer.status))
        except (aiohttp.ClientError, TimeoutError) as error:
            times.failed.append(type(error).__name__)
        times.seconds.append(time.monotonic() - began)

    end = time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        while time.monotonic() < end:
            tasks.create_task(one(health, "GET", "/health"))
            chat = one(tenant, "POST", "/v1/chat/completions", json=body, headers=headers)
            tasks.create_task(chat)
            await asyncio.sleep(PERIOD_S)
    return health, tenant


@asynccontextmanager
async def gateway(
    folder: Path, engines: list[int], tarpit: int
) -> AsyncIterator[tuple[int, int, dict[str, str]]]:
    """A gateway: its process, its port, and the keys of two tenants."""
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
                    raise SystemExit("the gateway does not start")
                await asyncio.sleep(0.1)
        yield process.pid, port, {name: key for name, (key, _) in made.items()}
        if process.returncode is not None:
            raise SystemExit(f"the gateway ended with {process.returncode}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def peak_mib(pid: int) -> float:
    """The most memory a process ever had."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def with_table(text: str, rows: list[Row], seconds: float) -> str:
    """A document with another table."""
    machine = f"{os.cpu_count()} x {platform.machine()}"
    said = f"Attacks of {seconds:g} s, {machine}, of which the attacker takes what it can:\n\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    table = "".join(f"{row}\n" for row in rows)
    return f"{before}{BEGIN}{said}{HEAD}{table}{END}{after}"


if __name__ == "__main__":
    raise SystemExit(main())
