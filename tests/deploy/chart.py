"""Rendering the chart, and finding things in what it renders."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "ep-serve"
EXAMPLES = sorted((ROOT / "deploy" / "helm" / "examples").glob("*.yaml"))
RELEASE = "rel"
NAME = "rel-ep-serve"

Object = dict[str, Any]

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The loader in C is ten times as fast; some builds of PyYAML lack it."""


@dataclass(frozen=True)
class Rendered:
    """The objects of a release."""

    objects: tuple[Object, ...]

    def all(self, kind: str) -> list[Object]:
        return [item for item in self.objects if item["kind"] == kind]

    def get(self, kind: str, suffix: str = "") -> Object:
        """The object with the name of the release and a suffix."""
        name = f"{NAME}-{suffix}" if suffix else NAME
        found = [item for item in self.all(kind) if item["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} objects {kind} {name}"
        return found[0]

    def has(self, kind: str, suffix: str = "") -> bool:
        name = f"{NAME}-{suffix}" if suffix else NAME
        return any(item["metadata"]["name"] == name for item in self.all(kind))

    def pod(self, suffix: str) -> Object:
        """The pod spec of a Deployment."""
        spec: Object = self.get("Deployment", suffix)["spec"]["template"]["spec"]
        return spec

    def container(self, suffix: str) -> Object:
        """The only container of a Deployment."""
        (container,) = self.pod(suffix)["containers"]
        result: Object = container
        return result

    @property
    def pods(self) -> dict[str, Object]:
        """Every pod spec by kind and name, those of tests too."""
        found = {}
        for item in self.objects:
            key = f"{item['kind']} {item['metadata']['name']}"
            if item["kind"] == "Deployment":
                found[key] = item["spec"]["template"]["spec"]
            elif item["kind"] == "Pod":
                found[key] = item["spec"]
        return found


def program(name: str) -> str:
    """A tool of development, from the environment of the tests or from the path."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.is_file() else shutil.which(name) or name


def run_helm(*arguments: str, values: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program("helm"), *arguments], input=values, capture_output=True, text=True, check=False
    )


@cache
def template(values: str) -> subprocess.CompletedProcess[str]:
    """`helm template` with values as YAML or JSON."""
    return run_helm("template", RELEASE, str(CHART), "--values=-", values=values)


def render(values: Object | Path) -> Rendered:
    """Render values; fails with Helm's message where they are refused."""
    text = values.read_text() if isinstance(values, Path) else json.dumps(values)
    done = template(text)
    assert done.returncode == 0, done.stderr
    return Rendered(tuple(item for item in yaml.load_all(done.stdout, LOADER) if item))


def refusal(values: Object) -> str:
    """What Helm says against values; fails where they are taken."""
    done = template(json.dumps(values))
    assert done.returncode != 0, "the values were taken"
    return done.stderr


def example(name: str) -> Rendered:
    return render(CHART.parent / "examples" / f"{name}.yaml")


def small(**more: Any) -> Object:
    """Values with one model `a`, whose fields are `model`, and what else is given."""
    model = {"checkpoint": {"path": "/models/a"}, **more.pop("model", {})}
    gateway = {"keysSecret": "keys", **more.pop("gateway", {})}
    return {"models": {"a": model}, "gateway": gateway, **more}


def merged(under: Object, over: Object) -> Object:
    """`under` with what `over` says differently, also further down."""
    result = dict(under)
    for name, value in over.items():
        below = result.get(name)
        nested = isinstance(value, dict) and isinstance(below, dict)
        result[name] = merged(below, value) if nested else value  # type: ignore[arg-type]
    return result
