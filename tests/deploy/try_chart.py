"""Run what the chart runs: `python -m tests.deploy.try_chart`. Linux and root only, no network.

The commands, arguments, environments, folders and users are those of the rendered example
`cpu-demo`: each container has a read-only root of its own, an unprivileged user without any
capability, and can write only where the chart mounts something. Names lead to addresses of a
private network. Then come the requests of `helm test`, the metrics, and the end of both under load.

Several runs do not meet: network, mounts and files are those of one run and gone with it. Nothing
but the engine's start-up probe has a limit that a busy machine could miss.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.chart import CHART, NAME, ROOT, Object, Rendered, merged, render
from tests.deploy.dockerfile import parse
from tests.deploy.load import Load
from tests.deploy.sandbox import Mount, Sandbox, reason_against

GATEWAY_PORT = 8080
ADDRESSES = {"engine-demo": "10.244.0.2", "gateway": "10.244.0.3"}
CHANGES: Object = {
    # A Service's port becomes the container's: nothing here maps one to the other.
    "gateway": {
        "service": {"port": GATEWAY_PORT},
        "settings": {"drain": {"delay_s": 5, "timeout_s": 240}},
    },
    "models": {
        "demo": {"startupSeconds": 600, "drain": {"preStopSeconds": 1, "shutdownSeconds": 240}}
    },
}
TIMEOUT_S = 120
"""Seconds for what takes one or two on an idle machine."""


class TrialError(Exception):
    """Something did not hold; the message says what."""


@dataclass
class Process:
    """A container that runs."""

    spec: Object
    process: subprocess.Popen[str]
    log: Path
    address: str

    def get(self, path: str, port: int | None = None) -> tuple[int, str]:
        """Status and body; status 0 if there is no response."""
        connection = http.client.HTTPConnection(
            self.address, port or self.spec["ports"][0]["containerPort"], timeout=TIMEOUT_S
        )
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def wait_until(self, probe: str, status: int = 200) -> None:
        """Wait until the path of a probe responds with a status.

        The start-up probe times out as in a cluster; the others have a longer limit.
        """
        rules = self.spec[probe]
        limit = TIMEOUT_S
        if probe == "startupProbe":
            limit = max(limit, rules["periodSeconds"] * rules["failureThreshold"])
        end = time.monotonic() + limit
        while self.get(rules["httpGet"]["path"])[0] != status:
            if self.process.poll() is not None or time.monotonic() > end:
                raise TrialError(f"{self.spec['name']}: {probe}: no {status}\n{self.tail()}")
            time.sleep(0.2)

    def terminate(self, grace: float, at_signal: Callable[[], None] = lambda: None) -> float:
        """preStop, SIGTERM, and SIGKILL after the grace period; seconds it took.

        `at_signal` is called just before SIGTERM.
        """
        began = time.monotonic()
        sleep = self.spec.get("lifecycle", {}).get("preStop", {}).get("sleep", {})
        time.sleep(sleep.get("seconds", 0))
        at_signal()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(grace - (time.monotonic() - began))
        except subprocess.TimeoutExpired:
            self.kill()
            raise TrialError(f"{self.spec['name']}: still there after {grace:.0f} s") from None
        if code != 0:
            raise TrialError(f"{self.spec['name']}: ended with {code}\n{self.tail()}")
        return time.monotonic() - began

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])


@dataclass
class Trial:
    """The rendered release in a sandbox."""

    rendered: Rendered
    sandbox: Sandbox
    folder: Path
    running: list[Process] = field(default_factory=list)
    _roots: int = 0

    def start(self, pod: Object, container: Object, address: str) -> Process:
        """Start a container of a pod as its user in its own read-only root."""
        self._roots += 1
        name = f"{container['name']}-{self._roots}"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounts = [
            Mount(m["mountPath"], self._volume(volumes[m["name"]], address), "readOnly" in m)
            for m in container["volumeMounts"]
        ]
        hosts = {f"{NAME}-{suffix}": found for suffix, found in ADDRESSES.items()}
        root = self.sandbox.root(
            name, mounts, hosts, read_only=container["securityContext"]["readOnlyRootFilesystem"]
        )
        log = self.folder / f"{name}.log"
        with log.open("w") as out:
            process = root.start(
                [*container["command"], *container.get("args", ())],
                self._environment(container, address),
                uid=pod["securityContext"]["runAsUser"],
                folder="/tmp",
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        started = Process(container, process, log, address)
        self.running.append(started)
        return started

    def complete(self, pod: Object, container: Object, address: str) -> None:
        """Run a container to its end.

        Raises:
            TrialError: it failed.
        """
        ran = self.start(pod, container, address)
        if ran.process.wait(3 * TIMEOUT_S) != 0:
            raise TrialError(f"{container['name']} {container.get('args')}: failed\n{ran.tail()}")

    def _environment(self, container: Object, address: str) -> dict[str, str]:
        image = "engine-cpu" if "engine-cpu" in container["image"] else "gateway"
        found = {**parse(image)[-1].environment, "LANG": "C.UTF-8"}
        # In the image the environment is elsewhere.
        found["PATH"] = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
        for item in container.get("env", ()):
            value = item.get("value")
            if value is None:
                assert item["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
                value = address
            for name, known in found.items():
                value = value.replace(f"$({name})", known)
            found[item["name"]] = value
        return found

    def _volume(self, volume: Object, owner: str) -> Path:
        """The folder that stands for a volume of a pod."""
        folder = self.folder / "volumes" / owner / str(volume["name"])
        if folder.is_dir():
            return folder
        folder.mkdir(parents=True)
        if "configMap" in volume:
            suffix = volume["configMap"]["name"].removeprefix(f"{NAME}-")
            for name, text in self.rendered.get("ConfigMap", suffix)["data"].items():
                (folder / name).write_text(text)
        else:
            folder.chmod(0o770)
            os.chown(folder, 10_001, 10_001)
        return folder


def reason_against_pods() -> str:
    """Why the pods cannot be played here; empty if they can."""
    if ROOT.is_relative_to("/tmp"):
        return "the pods have a /tmp of their own, which would hide this checkout"
    return reason_against()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keep", type=Path, help="folder for logs and what /metrics said")
    keep = parser.parse_args().keep
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends what runs, too
    if reason := reason_against_pods():
        print(f"This cannot run here: {reason}.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as made:
        folder = Path(keep or made)
        Path(made).chmod(0o755)
        try:
            with private_release(folder) as trial:
                run(trial)
        except TrialError as error:
            print(f"\n{error}", file=sys.stderr)
            return 1
    return 0


@contextmanager
def private_release(folder: Path) -> Iterator[Trial]:
    """A sandbox with the example `cpu-demo`; this thread is in its network."""
    example = yaml.safe_load((CHART.parent / "examples" / "cpu-demo.yaml").read_text())
    rendered = render(merged(example, CHANGES))
    folder.mkdir(parents=True, exist_ok=True)
    with Sandbox(folder / "sandbox", network=False) as sandbox:
        for address in ADDRESSES.values():
            words = [*sandbox.inside(), "ip", "address", "add", f"{address}/32", "dev", "lo"]
            subprocess.run(words, check=True)
        trial = Trial(rendered, sandbox, folder)
        try:
            with sandbox.network():
                yield trial
        finally:
            for process in trial.running:
                process.kill()


def run(trial: Trial) -> None:
    """Everything, in order, with a line for each step."""
    step = Steps()
    pod = trial.rendered.pod("engine-demo")
    for again in ("", ", once more as after a restart of its pod"):
        for container in pod["initContainers"]:
            trial.complete(pod, container, ADDRESSES["engine-demo"])
            step(f"init container {container['name']}{again}")
    engine = trial.start(pod, pod["containers"][0], ADDRESSES["engine-demo"])
    gateway = start_gateway(trial)
    step("gateway started; not ready without an engine", gateway.get("/ready")[0] == 503)
    engine.wait_until("startupProbe")
    step("engine started")
    gateway.wait_until("readinessProbe")
    step("gateway ready")
    for name, test in trial.rendered.pods.items():
        if name.startswith("Pod "):
            trial.complete(test, test["containers"][0], "10.244.0.3")
            step(f"helm test {name.removeprefix('Pod ')}")
    for process, port in ((engine, 8000), (gateway, 9090)):
        status, text = process.get("/metrics", port)
        (trial.folder / f"{process.spec['name']}.metrics").write_text(text)
        step(f"metrics of the {process.spec['name']}", status == 200)
    for process in (engine, gateway):
        step(f"the {process.spec['name']} is alive", alive(process))

    load = load_on(gateway)
    load.request_while_ready(lambda: end_gateway(gateway, trial, load, step))
    step(f"gateway ended under load: {load.outcome}", load.nothing_lost)
    gateway = start_gateway(trial)
    gateway.wait_until("readinessProbe")
    step("gateway started again, with what it had stored")
    load = load_on(gateway)
    load.request_once(lambda: end_engine(engine, trial, load, step))
    step(f"engine ended under load: {load.outcome}", load.nothing_lost)


def load_on(gateway: Process) -> Load:
    return Load(gateway.address, GATEWAY_PORT, lambda: gateway.get("/ready")[0] == 200)


def start_gateway(trial: Trial) -> Process:
    pod = trial.rendered.pod("gateway")
    gateway = trial.start(pod, pod["containers"][0], ADDRESSES["gateway"])
    gateway.wait_until("startupProbe")
    return gateway


def end_gateway(gateway: Process, trial: Trial, load: Load, step: Steps) -> None:
    """SIGTERM; readiness turns while the port is still open."""
    grace = trial.rendered.pod("gateway")["terminationGracePeriodSeconds"]
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(gateway.terminate, grace, load.wait_until_all_run)
        gateway.wait_until("readinessProbe", 503)
        step("readiness turns, and the port is still open")
        step(f"gateway ended in {ended.result():.1f} s")


def end_engine(engine: Process, trial: Trial, load: Load, step: Steps) -> None:
    grace = trial.rendered.pod("engine-demo")["terminationGracePeriodSeconds"]
    step(f"engine ended in {engine.terminate(grace, load.wait_until_all_run):.1f} s")


def alive(process: Process) -> bool:
    return process.get(process.spec["livenessProbe"]["httpGet"]["path"])[0] == 200


class Steps:
    """Prints what was done and how long it took."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self, text: str, holds: Any = True) -> None:
        now = time.monotonic()
        print(f"{'ok  ' if holds else 'FAIL'} {now - self._last:6.1f} s  {text}", flush=True)
        self._last = now
        if not holds:
            raise TrialError(text)


if __name__ == "__main__":
    sys.exit(main())
