"""Values that make no sense are refused, with a message that names what is wrong."""

from __future__ import annotations

import pytest

from tests.deploy.chart import Object, merged, refusal, render, small

REFUSED: dict[str, tuple[Object, str]] = {
    # what the schema says
    "a misspelt top name": ({"gatewy": {}}, "gatewy is not allowed"),
    "a misspelt model field": ({"models": {"a": {"gpu": 1}}}, "gpu is not allowed"),
    "a misspelt default": ({"engine": {"replica": 1}}, "replica is not allowed"),
    "a misspelt option of the reduction": (
        {"models": {"a": {"reduction": {"keep_ratio": 0.1}}}},
        "keep_ratio is not allowed",
    ),
    "a keep ratio of nothing": (
        {"models": {"a": {"reduction": {"keepRatio": 0}}}},
        "keepRatio: Must be greater than 0",
    ),
    "a keep ratio in percent": (
        {"models": {"a": {"reduction": {"keepRatio": 20}}}},
        "keepRatio: Must be less than or equal to 1",
    ),
    "a number as text": ({"models": {"a": {"gpus": "1"}}}, "gpus: Invalid type"),
    "a negative number": ({"models": {"a": {"replicas": -1}}}, "replicas: Must be greater than"),
    "a model's name with capitals": (
        {"models": {"Omni": {"checkpoint": {"path": "/m"}}}},
        'Property name of "Omni" does not match',
    ),
    "a digest that is too short": (
        {"images": {"engine": {"digest": "sha256:12ab"}}},
        "images.engine.digest: Does not match pattern",
    ),
    "a pull policy that does not exist": (
        {"images": {"gateway": {"pullPolicy": "always"}}},
        "images.gateway.pullPolicy must be one of",
    ),
    "a download over plain HTTP": (
        {"models": {"a": {"checkpoint": {"download": {"source": "http://x.org/m.tar"}}}}},
        "download.source: Does not match pattern",
    ),
    "a repository without a commit": (
        {"models": {"a": {"checkpoint": {"download": {"source": "hf://o/n@main"}}}}},
        "download.source: Does not match pattern",
    ),
    "a relative checkpoint": (
        {"models": {"a": {"checkpoint": {"path": "models/a"}}}},
        "checkpoint.path: Does not match pattern",
    ),
    "a size without sense": ({"engine": {"shmSize": "8 GB"}}, "shmSize: Does not match pattern"),
    "an access mode that does not exist": (
        {"engine": {"modelCache": {"accessModes": ["ReadWriteAll"]}}},
        "accessModes.0 must be one of",
    ),
    "an autoscaler that does not exist": (
        {"engine": {"autoscaling": {"kind": "vpa"}}},
        "autoscaling.kind must be one of",
    ),
    "scaling down in a hurry": (
        {"engine": {"autoscaling": {"scaleDownSeconds": 5}}},
        "scaleDownSeconds: Must be greater than or equal to 60",
    ),
    "no time to leave the Service": (
        {"engine": {"drain": {"preStopSeconds": 0}}},
        "preStopSeconds: Must be greater than or equal to 1",
    ),
    "an option with dashes": (
        {"engine": {"options": {"--max-model-len": 1}}},
        'Property name of "--max-model-len" does not match',
    ),
    "a list as an option": (
        {"engine": {"options": {"max-model-len": [1]}}},
        "options.max-model-len: Invalid type",
    ),
    "a gateway setting that does not exist": (
        {"gateway": {"settings": {"media": {"max_byte": 1}}}},
        "max_byte is not allowed",
    ),
    "a gateway setting out of range": (
        {"gateway": {"settings": {"queue": {"timeout_s": 0}}}},
        "timeout_s: Must be greater than 0",
    ),
    "a gateway setting of the chart": (
        {"gateway": {"settings": {"port": 80}}},
        "port is not allowed",
    ),
    "the place of the store": (
        {"gateway": {"settings": {"store": {"path": "/tmp"}}}},
        "path is not allowed",
    ),
    "no gateway": ({"gateway": {"replicas": 0}}, "replicas: Must be greater than or equal to 1"),
    "a service type that does not exist": (
        {"gateway": {"service": {"type": "ExternalName"}}},
        "service.type must be one of",
    ),
    "a first token objective between buckets": (
        {"monitoring": {"rules": {"ttftSeconds": 3}}},
        "ttftSeconds must be one of",
    ),
    "runbooks at a heading": (
        {"monitoring": {"rules": {"runbookUrl": "https://x.org/runbooks#a"}}},
        "runbookUrl: Does not match pattern",
    ),
    "no name service": ({"networkPolicy": {"dns": []}}, "dns: Array must have at least 1 items"),
    "a peer that is everything": (
        {"networkPolicy": {"clients": [{}]}},
        "clients.0: Must have at least 1 properties",
    ),
    "a secret's value instead of its name": (
        {"gateway": {"keysSecret": "sk-ep-AbCdEf"}},
        "keysSecret: Does not match pattern",
    ),
    "a toleration instead of a list": (
        {"engine": {"tolerations": {"key": "x"}}},
        "tolerations: Invalid type",
    ),
    "an environment variable without a name": (
        {"engine": {"env": [{"value": "1"}]}},
        "name is required",
    ),
    # what fields say about each other
    "a checkpoint from two places": (
        {"models": {"a": {"checkpoint": {"embedded": True}}}},
        "models.a.checkpoint: give exactly one of path, embedded and download.source (got 2)",
    ),
    "a checkpoint from nowhere": (
        {"models": {"a": {"checkpoint": {"path": ""}}}},
        "models.a.checkpoint: give exactly one of path, embedded and download.source (got 0)",
    ),
    "a download without a digest": (
        {"models": {"b": {"checkpoint": {"download": {"source": "https://x.org/m.tar"}}}}},
        "models.b.checkpoint.download.sha256: is needed with a source",
    ),
    "two models of one name": (
        {"models": {"b": {"checkpoint": {"path": "/models/b"}, "servedName": "a"}}},
        "models.b.servedName: a is the name of models.a already",
    ),
    "fewer pods at most than at least": (
        {"models": {"a": {"autoscaling": {"kind": "keda", "minReplicas": 5}}}},
        "models.a.autoscaling: minReplicas (5) is greater than maxReplicas (4)",
    ),
    "several pods on a claim for one node": (
        {"models": {"a": {"replicas": 2, "modelCache": {"size": "1Gi"}}}},
        "models.a.modelCache.accessModes: 2 pods share the claim",
    ),
    "an option that the chart sets": (
        {"models": {"a": {"options": {"port": 9000}}}},
        "models.a.options.port: is set by the chart",
    ),
    "engines with different keys": (
        {"models": {"b": {"checkpoint": {"path": "/models/b"}, "apiKeySecret": "other"}}},
        "engine.apiKeySecret: the gateway sends one key",
    ),
    "neither keys nor everybody": (
        {"gateway": {"keysSecret": ""}},
        "gateway.keysSecret: name a Secret with API keys, or set gateway.allowAnonymous: true",
    ),
    "keys and everybody": (
        {"gateway": {"allowAnonymous": True}},
        "gateway.allowAnonymous: contradicts gateway.keysSecret",
    ),
    "two gateways on one store": (
        {"gateway": {"replicas": 2, "store": {"persistent": True}}},
        "gateway.store.persistent: one process owns the store, so replicas must be 1 (got 2)",
    ),
    "keys of no bucket": (
        {"gateway": {"store": {"s3Secret": "bucket-keys"}}},
        "gateway.store.s3Secret: name the bucket too, in gateway.settings.store.s3",
    ),
    "keys of a bucket in plain sight": (
        {"gateway": {"settings": {"store": {"s3": {"bucket": "b", "secret_access_key": "x"}}}}},
        "secret_access_key",
    ),
    "a bucket without a name": ({"gateway": {"settings": {"store": {"s3": {}}}}}, "s3"),
    "an Ingress without a host": ({"ingress": {"enabled": True}}, "ingress.host: give a host name"),
    "a route without a Gateway": (
        {"httpRoute": {"enabled": True}},
        "httpRoute.parentRefs: name at least one Gateway",
    ),
}


def test_the_values_below_the_wrong_ones_are_right() -> None:
    assert render(small()).objects


def test_a_release_without_a_model_is_refused() -> None:
    assert "models: name at least one model" in refusal({**small(), "models": {}})


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_values_are_refused_with_the_reason(case: str) -> None:
    wrong, message = REFUSED[case]
    assert message in refusal(merged(small(), wrong))
