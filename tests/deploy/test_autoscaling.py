"""Autoscalers find the series that Prometheus has when it scrapes what the chart renders."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from tests.deploy.chart import ROOT, Object, Rendered, render, small

README = (ROOT / "deploy" / "README.md").read_text()
PODS = 2
NOW = {
    "vllm:num_requests_running": 3,
    "vllm:num_requests_waiting": 2,
    "vllm:kv_cache_usage_perc": 0.5,
    "ep_serve_gateway_queued": 4,
}
"""What each pod exports; the series of engines have vLLM's prefix."""


@cache
def scaled(kind: str) -> Rendered:
    return render(small(model={"autoscaling": {"kind": kind}}, monitoring={"monitors": True}))


def adapter_rules() -> dict[str, Object]:
    """The rules of the page by the name they give a metric."""
    block = re.search(r"For prometheus-adapter:\n\n((?: {4}.*\n)+)", README)
    assert block is not None
    rules = yaml.safe_load(block[1])["rules"]["custom"]
    return {rule["name"]["as"]: rule for rule in rules}


@dataclass(frozen=True)
class Target:
    """A pod that is scraped, with the labels that all of its series get."""

    component: str
    labels: dict[str, str]


def targets(rendered: Rendered) -> Iterator[Target]:
    """What the Prometheus operator makes of the PodMonitors and the Deployments' pods."""
    for monitor in rendered.all("PodMonitor"):
        spec = monitor["spec"]
        (endpoint,) = spec["podMetricsEndpoints"]
        for deployment in rendered.all("Deployment"):
            template = deployment["spec"]["template"]
            own = template["metadata"]["labels"]
            (container,) = template["spec"]["containers"]
            if not spec["selector"]["matchLabels"].items() <= own.items():
                continue
            assert endpoint["port"] in {port["name"] for port in container["ports"]}
            for number in range(PODS):
                labels = {
                    "namespace": deployment["metadata"]["namespace"],
                    "pod": f"{deployment['metadata']['name']}-6d5f9c7b84-x{number}z2k",
                    "container": container["name"],
                    "endpoint": endpoint["port"],
                    "job": f"{monitor['metadata']['namespace']}/{monitor['metadata']['name']}",
                }
                for name in spec.get("podTargetLabels", ()):
                    labels[re.sub(r"\W", "_", name)] = own[name]
                for rule in endpoint.get("relabelings", ()):
                    labels[rule["targetLabel"]] = rule["replacement"]
                yield Target(own["app.kubernetes.io/component"], labels)


def series(rendered: Rendered) -> Iterator[Object]:
    """The series of all targets, as promtool's tests want them."""
    for target in targets(rendered):
        labels = ",".join(f'{name}="{value}"' for name, value in target.labels.items())
        for name, value in NOW.items():
            if (target.component == "engine") == name.startswith("vllm:"):
                yield {"series": f"{name}{{{labels}}}", "values": str(value)}


@dataclass(frozen=True)
class RequiredMetric:
    """A metric of an HPA, as the adapter looks for it."""

    metric: str
    resource: str
    names: tuple[str, ...]

    @property
    def rule(self) -> Object:
        return adapter_rules()[self.metric]

    @property
    def query(self) -> str:
        """The rule's query with its placeholders filled as the adapter does."""
        matchers = f'namespace="default",{self.resource}=~"{"|".join(self.names)}"'
        text: str = self.rule["metricsQuery"]
        return text.replace("<<.LabelMatchers>>", matchers).replace("<<.GroupBy>>", self.resource)


def required_metrics(rendered: Rendered) -> Iterator[RequiredMetric]:
    pods = tuple(t.labels["pod"] for t in targets(rendered) if t.component == "engine")
    for metric in rendered.get("HorizontalPodAutoscaler", "engine-a")["spec"]["metrics"]:
        source = metric[metric["type"].lower()]
        described = source.get("describedObject")
        names = (described["name"],) if described else pods
        resource = described["kind"].lower() if described else "pod"
        yield RequiredMetric(source["metric"]["name"], resource, names)


def test_the_adapter_has_an_object_for_every_metric_of_the_hpa() -> None:
    rendered = scaled("hpa")
    services = {item["metadata"]["name"] for item in rendered.all("Service")}
    for item in required_metrics(rendered):
        overrides = item.rule["resources"]["overrides"]
        assert overrides[item.resource] == {"resource": item.resource}
        labels = set(re.findall(r'(\w+)!=""', item.rule["seriesQuery"]))
        assert labels == {"namespace", item.resource} == set(overrides)
        component = "engine" if item.rule["seriesQuery"].startswith("vllm:") else "gateway"
        for target in targets(rendered):
            if target.component == component:
                assert target.labels[item.resource] in item.names
        assert item.resource != "service" or set(item.names) <= services


def test_the_page_has_no_unexpected_rule() -> None:
    assert adapter_rules().keys() == {item.metric for item in required_metrics(scaled("hpa"))}


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)
def test_prometheus_answers_autoscalers_with_what_pods_export(tmp_path: Path) -> None:
    """Prometheus itself evaluates the queries over the series of the rendered monitors."""
    keda = scaled("keda")
    waiting, cache_use = (
        trigger["metadata"]["query"]
        for trigger in keda.get("ScaledObject", "engine-a")["spec"]["triggers"]
    )
    requests = PODS * (NOW["vllm:num_requests_running"] + NOW["vllm:num_requests_waiting"])
    queued = PODS * NOW["ep_serve_gateway_queued"]
    expected = [(waiting, [("{}", requests + queued)]), (cache_use, [("{}", 0.5)])]
    each = {"vllm_num_requests": requests / PODS, "vllm_kv_cache_usage_perc": 0.5,
            "ep_serve_gateway_queued": queued}  # fmt: skip
    for item in required_metrics(scaled("hpa")):
        found = [(f'{{{item.resource}="{name}"}}', each[item.metric]) for name in item.names]
        expected.append((item.query, found))
        expected.append((f"count({item.rule['seriesQuery']})", [("{}", PODS)]))
    tests = [
        {
            "expr": query,
            "eval_time": "0",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in samples],
        }
        for query, samples in expected
    ]
    file = tmp_path / "tests.yaml"
    file.write_text(
        yaml.safe_dump({"tests": [{"input_series": [*series(keda)], "promql_expr_test": tests}]})
    )
    done = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
