"""Linters and schemas over everything the chart renders, and the files made from others."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml

from tests.deploy.chart import CHART, EXAMPLES, Object, render, run_helm, small
from tests.deploy.custom_resources import SCHEMAS

KUBERNETES = ("1.34", "1.37")
SWITCHES: dict[str, Object] = {
    "an HPA and a claim": small(
        model={
            "autoscaling": {"kind": "hpa"},
            "modelCache": {"size": "10Gi", "accessModes": ["ReadWriteMany"]},
        }
    ),
    "a load balancer": small(gateway={"service": {"type": "LoadBalancer"}, "replicas": 3}),
    "very long videos": small(
        gateway={"settings": {"request_timeout_s": 86_400, "media": {"max_bytes": 64 << 30}}},
        httpRoute={"enabled": True, "parentRefs": [{"name": "public"}], "nginxBodySize": True},
    ),
}
RENDERED = {
    **{file.stem: render(file) for file in EXAMPLES},
    **{name: render(values) for name, values in SWITCHES.items()},
}
OWN = {
    f"{name}: {item['kind']} {item['metadata']['name']}": item
    for name, rendered in RENDERED.items()
    for item in rendered.objects
    if (item["apiVersion"], item["kind"]) in SCHEMAS
}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_an_example_passes_helms_linter(file: Path) -> None:
    done = run_helm("lint", "--strict", str(CHART), f"--values={file}")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", RENDERED)
def test_kubernetes_accepts_every_field(name: str, version: str) -> None:
    for item in RENDERED[name].objects:
        if (item["apiVersion"], item["kind"]) not in SCHEMAS:
            check_fields(json.dumps(item), version)


@cache
def check_fields(item: str, version: str) -> None:
    """Once for each object: most are the same in several releases."""
    kubernetes_validate.validate(json.loads(item), version, strict=True)


@pytest.mark.parametrize("item", OWN.values(), ids=OWN)
def test_a_custom_resource_has_the_shape_of_its_definition(item: Object) -> None:
    schema = SCHEMAS[item["apiVersion"], item["kind"]]
    jsonschema.Draft202012Validator(schema).validate(item)


def test_every_schema_of_a_custom_resource_is_used() -> None:
    assert {(item["apiVersion"], item["kind"]) for item in OWN.values()} == set(SCHEMAS)


@pytest.mark.parametrize("program", ["generate", "dashboards"])
def test_generated_files_are_current(program: str) -> None:
    for file, text in load_program(program).outputs().items():
        assert file.read_text() == text, f"run: python deploy/helm/{program}.py"


def test_every_value_has_a_comment() -> None:
    text = (CHART / "values.yaml").read_text()
    documented = {item.name for item in load_program("generate").documented(text)}
    for name in leaves(yaml.safe_load(text)):
        parts = name.split(".")
        assert documented & {".".join(parts[:end]) for end in range(1, len(parts) + 1)}, name


def leaves(values: Object, above: str = "") -> Iterator[str]:
    """The dotted names of all values that are not sections."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def load_program(name: str) -> ModuleType:
    """A script beside the chart, as a module."""
    path = CHART.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"chart_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
