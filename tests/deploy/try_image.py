"""Follow a Dockerfile without Docker: `python -m tests.deploy.try_image engine-cpu`.

Linux and root only, with a package index. Each stage gets a root of its own in which its commands
run as they are written; the base is this machine with the Python of the tests. Then the entry point
is started as the image's user, and asked. The engine needs 12 GiB of disk and some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.deploy.chart import ROOT
from tests.deploy.dockerfile import Instruction, Stage, parse
from tests.deploy.sandbox import Root, Sandbox, reason_against

PATH = f"{Path(sys.executable).resolve().parent}:/usr/sbin:/usr/bin:/sbin:/bin"
UNREACHABLE = ("No matching distribution found", "Max retries exceeded")
DISK_GIB = {"engine-cpu": 12}
"""Images that are too large for memory, with the space they need."""

TIMEOUT_S = 600
"""Seconds for a server to answer: a busy machine is slow."""

Say = Callable[[str], None]


class UnreachableError(Exception):
    """There is no package index."""


class ImageError(Exception):
    """A step failed, or what was built does not work; the message has the end of the output."""


@dataclass
class Image:
    """What the last stage of a Dockerfile gave."""

    stage: Stage
    root: Root
    environment: dict[str, str]

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command as a container does: the image's user, environment and folder."""
        return self.root.start(
            command,
            self.environment,
            uid=int(self.stage.last("USER").text.partition(":")[0]),
            folder=self.stage.last("WORKDIR").text,
            **options,
        )

    def run(self, *command: str) -> str:
        """The output of a command.

        Raises:
            ImageError: it failed.
        """
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output = process.communicate()[0]
        if process.returncode != 0:
            raise ImageError(f"{shlex.join(command)}\n{output[-3_000:]}")
        return output

    def entry(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start the entry point."""
        return self.start([*self.stage.last("ENTRYPOINT").words, *arguments], **options)

    def mib(self, path: str) -> int:
        """What a folder of the image takes on disk."""
        command = ["du", "-sm", path]
        measured = self.root.start(command, {"PATH": PATH}, stdout=subprocess.PIPE)
        return int(measured.communicate()[0].split()[0])


@dataclass
class Follower:
    """Does what the stages of a Dockerfile say; files come from the repository."""

    sandbox: Sandbox
    log: Path
    say: Say = field(default=lambda text: None)
    _roots: dict[str, Root] = field(default_factory=dict)

    def build(self, name: str, arguments: Mapping[str, str] | None = None) -> Image:
        """Follow all stages; `arguments` are build arguments.

        Raises:
            UnreachableError: packages cannot be had.
            ImageError: a command failed.
        """
        stages = parse(name, arguments)
        for stage in stages:
            root, environment = self._follow(stage)
        return Image(stages[-1], root, environment)

    def _follow(self, stage: Stage) -> tuple[Root, dict[str, str]]:
        root = self.sandbox.root(stage.name or "final")
        self._roots[stage.name] = root
        own = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        environment = {**own, "PATH": PATH, "HOME": "/root"}
        folder = "/"
        for item in stage.instructions:
            began = time.monotonic()
            if item.word == "WORKDIR":
                folder = item.text
                self._run(root, f"mkdir -p {folder}", environment, "/")
            elif item.word == "ENV":
                for name, value in (word.split("=", 1) for word in item.words):
                    environment[name] = value.replace(f"${name}", environment.get(name, ""))
            elif item.word == "COPY":
                self._copy(root, item, folder)
            elif item.word == "RUN":
                self._run(root, item.text, environment, folder)
            if item.word in {"COPY", "RUN"}:
                self.say(f"{time.monotonic() - began:6.1f} s  {item.word} {item.text[:80]}")
        return root, environment

    def _copy(self, root: Root, item: Instruction, folder: str) -> None:
        *sources, target = item.words
        origin = ROOT
        for flag in item.flags:
            origin = self._roots[flag.removeprefix("--from=")].path
        place = root.path / os.path.normpath(f"{folder}/{target}").lstrip("/")
        script = f"mkdir -p {place if target.endswith('/') else place.parent}\n"
        script += "".join(f"cp -r {origin}/{source} {place}\n" for source in sources)
        subprocess.run([*self.sandbox.inside(), "sh", "-euc", script], check=True)

    def _run(self, root: Root, script: str, environment: dict[str, str], folder: str) -> None:
        with self.log.open("a") as out:
            process = root.start(
                ["sh", "-euc", script],
                environment,
                folder=folder,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        if process.wait() != 0:
            said = self.log.read_text()[-3_000:]
            kind = UnreachableError if any(reason in said for reason in UNREACHABLE) else ImageError
            raise kind(f"{script}\n{said}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(url: str, process: subprocess.Popen[str]) -> None:
    """Wait until a server answers.

    Raises:
        ImageError: it ended, or did not answer in time.
    """
    end = time.monotonic() + TIMEOUT_S
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=30):
                return
        except OSError:
            time.sleep(0.2)
    raise ImageError(f"{url} does not answer")


def stop(process: subprocess.Popen[str]) -> None:
    """SIGTERM; the server has to end by itself, and without an error.

    Raises:
        ImageError: it did not.
    """
    process.terminate()
    try:
        code = process.wait(TIMEOUT_S)
    finally:
        process.kill()
    if code != 0:
        raise ImageError(f"the server ended with {code}")


def try_gateway(image: Image) -> None:
    """The gateway answers that it lives."""
    port = free_port()
    options = [f"--port={port}", "--store=/store", "--upstream=http://127.0.0.1:9"]
    image.environment["EP_SERVE_GATEWAY_METRICS__ENABLED"] = "false"
    gateway = image.entry("gateway", *options)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", gateway)
    finally:
        stop(gateway)


def try_engine(image: Image) -> None:
    """The engine makes the embedded checkpoint, serves it and answers."""
    image.run(*image.stage.last("ENTRYPOINT").words, "checkpoint", "embedded", "--to=/models/demo")
    url = f"http://127.0.0.1:{(port := free_port())}"
    options = ["--served-model-name=demo", "--max-model-len=2048", "--enforce-eager"]
    engine = image.entry(
        "serve", "/models/demo", "--host=127.0.0.1", f"--port={port}", *options,
        "--kv-cache-memory-bytes=67108864",
    )  # fmt: skip
    try:
        wait_for(f"{url}/health", engine)
        body = {"model": "demo", "max_tokens": 4, "ignore_eos": True, "prompt": "one two"}
        request = urllib.request.Request(
            f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            tokens = json.load(answer)["usage"]["completion_tokens"]
    finally:
        stop(engine)
    if tokens != body["max_tokens"]:
        raise ImageError(f"{tokens} tokens came, {body['max_tokens']} were asked for")


TRIALS: dict[str, Callable[[Image], None]] = {"gateway": try_gateway, "engine-cpu": try_engine}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", choices=TRIALS)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args()
    if reason := reason_against():
        print(f"This cannot run here: {reason}.", file=sys.stderr)
        return 2
    arguments = dict(word.split("=", 1) for word in given.build_arg)
    with tempfile.TemporaryDirectory(prefix="image-") as made:
        folder = Path(made)
        folder.chmod(0o755)
        disk = DISK_GIB.get(given.image, 0)
        with Sandbox(folder / "sandbox", network=True, disk_gib=disk) as sandbox:
            try:
                image = Follower(sandbox, folder / "build.log", say).build(given.image, arguments)
                began = time.monotonic()
                TRIALS[given.image](image)
            except (ImageError, UnreachableError) as error:
                print(f"\n{error}", file=sys.stderr)
                return 1
            say(f"{time.monotonic() - began:6.1f} s  started, answered and stopped")
            for item in image.stage.all("COPY"):
                if item.words[-1].startswith("/"):
                    say(f"{image.mib(item.words[-1])} MiB in {item.words[-1]}")
    return 0


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
