"""Rules and dashboards: they parse, they link to a runbook, they ask for metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ep_serve.gateway.metrics import Metrics
from tests.deploy.chart import CHART, ROOT, Object, example, render, small

DASHBOARDS = sorted((CHART / "files" / "dashboards").glob("*.json"))
RUNBOOKS = ROOT / "deploy" / "RUNBOOKS.md"
ENGINE_SERIES = Path(__file__).with_name("engine_series.txt")
NAME = re.compile(r"\b(?:vllm:\w+|ep_serve_\w+)")


def rules() -> list[Object]:
    groups = example("tensor-parallel").get("PrometheusRule")["spec"]["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = [rule for rule in rules() if "alert" in rule]


def queries(file: Path) -> dict[str, str]:
    """The queries of a dashboard by panel and legend."""
    panels = json.loads(file.read_text())["panels"]
    return {
        f"{panel['title']} / {target['legendFormat']}": target["expr"]
        for panel in panels
        for target in panel.get("targets", ())
    }


def samples(exposition: str) -> set[str]:
    """The names of all samples in what `/metrics` answers."""
    families = text_string_to_metric_families(exposition)
    declared = {
        f"{family.name}{suffix}"
        for family in text_string_to_metric_families(exposition)
        for suffix in {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",)}.get(
            family.type, ("",)
        )
    }
    return declared | {sample.name for family in families for sample in family.samples}


def exported() -> set[str]:
    """Series of a gateway, and those that an engine with the embedded checkpoint showed."""
    return samples(generate_latest(Metrics().registry).decode()) | set(
        ENGINE_SERIES.read_text().split()
    )


def asked_for(query: str) -> set[str]:
    return set(NAME.findall(re.sub(r'"[^"]*"', '""', query)))


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_every_query_of_a_dashboard_uses_existing_metrics(file: Path) -> None:
    known = exported()
    missing = {name: asked_for(query) - known for name, query in queries(file).items()}
    assert not {name: absent for name, absent in missing.items() if absent}
    assert all(asked_for(query) for query in queries(file).values())


def test_every_rule_uses_existing_metrics() -> None:
    recorded = {rule["record"].split(":")[0] for rule in rules() if "record" in rule}
    for rule in rules():
        names = {name for name in asked_for(rule["expr"]) if name not in recorded}
        assert names - {"rel_ep_serve"} <= exported(), rule["expr"]


def test_autoscalers_use_existing_metrics() -> None:
    for trigger in example("replicas").get("ScaledObject", "engine-omni-3b")["spec"]["triggers"]:
        assert asked_for(trigger["metadata"]["query"]) <= exported()


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_panels_do_not_overlap(file: Path) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(file.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_every_dashboard_becomes_a_config_map_that_grafana_finds() -> None:
    rendered = example("multi-tenant")
    for file in DASHBOARDS:
        item = rendered.get("ConfigMap", f"dashboard-{file.stem}")
        assert item["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert json.loads(item["data"][f"ep-serve-{file.name}"]) == json.loads(file.read_text())


def test_nothing_is_monitored_by_default() -> None:
    rendered = render(small())
    kinds = {item["kind"] for item in rendered.objects}
    assert not kinds & {"PodMonitor", "PrometheusRule", "ScaledObject"}
    assert not rendered.has("ConfigMap", "dashboard-serving")


def test_monitors_have_the_labels_that_prometheus_selects_by() -> None:
    rendered = example("tensor-parallel")
    for kind, suffix in (
        ("PodMonitor", "engine"),
        ("PodMonitor", "gateway"),
        ("PrometheusRule", ""),
    ):
        labels = rendered.get(kind, suffix)["metadata"]["labels"]
        assert labels["release"] == "kube-prometheus-stack"


def test_every_expected_alert_is_defined() -> None:
    assert {rule["alert"] for rule in ALERTS} == {
        "EpServeErrorBudgetBurn",
        "EpServeFirstTokenLate",
        "EpServeKvCacheFull",
        "EpServePreemptions",
        "EpServeEngineDown",
        "EpServeNoEngine",
        "EpServeRequestQuarantined",
        "EpServeStoreNearlyFull",
        "EpServeTowerCacheCollapse",
    }


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_links_to_its_heading_in_the_runbooks(rule: Object) -> None:
    address, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert address == "deploy/RUNBOOKS.md"
    headings = re.findall(r"^## (.*)$", RUNBOOKS.read_text(), re.MULTILINE)
    assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def test_alerts_link_to_where_the_runbooks_are_published() -> None:
    published = "https://wiki.example.org/runbooks"
    rendered = render(small(monitoring={"rules": {"enabled": True, "runbookUrl": published}}))
    groups = rendered.get("PrometheusRule")["spec"]["groups"]
    found = [rule for group in groups for rule in group["rules"] if "alert" in rule]
    assert len(found) == len(ALERTS)
    for rule in found:
        assert rule["annotations"]["runbook_url"] == f"{published}#{rule['alert'].lower()}"


def test_the_objectives_of_the_values_are_in_the_rules() -> None:
    monitoring = {
        "rules": {"enabled": True, "errorBudget": 0.02, "ttftSeconds": 2.5, "ttftObjective": 0.95}
    }
    rendered = render(small(monitoring=monitoring, gateway={"store": {"sizeGiB": 10}}))
    text = json.dumps(rendered.get("PrometheusRule")["spec"])
    assert "> 0.288" in text  # 14.4 times the budget
    assert 'le=~\\"2.5' in text
    assert f"/ {7.5 * 2**30:.0f}" in text


def test_the_objectives_are_buckets_of_the_gateway() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    rule = schema["properties"]["monitoring"]["properties"]["rules"]["properties"]
    text = generate_latest(Metrics().registry).decode()
    name = "ep_serve_gateway_time_to_first_token_seconds_bucket"
    buckets = {float(found) for found in re.findall(name + r'\{le="([\d.]+)"\}', text)}
    assert set(rule["ttftSeconds"]["enum"]) <= buckets


needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


@pytest.fixture(scope="module")
def rule_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rules") / "rules.yaml"
    file.write_text(yaml.safe_dump(example("tensor-parallel").get("PrometheusRule")["spec"]))
    return file


@needs_promtool
def test_promtool_takes_the_rules(rule_file: Path) -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", "--lint=all", "--lint-fatal", str(rule_file)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then(rule_file: Path) -> None:
    """Series are made up, Prometheus itself evaluates the rules."""
    tests = rule_file.with_name("tests.yaml")
    tests.write_text(
        (Path(__file__).with_name("alerts.yaml")).read_text().replace("RULES", str(rule_file))
    )
    done = subprocess.run(
        ["promtool", "test", "rules", str(tests)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_every_query_of_a_dashboard_is_promql(file: Path, tmp_path: Path) -> None:
    records = [
        {"record": f"query_{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(queries(file).values())
    ]
    rule_file = tmp_path / "queries.yaml"
    rule_file.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": records}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", str(rule_file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
