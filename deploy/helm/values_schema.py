"""JSON schema of the chart's values; unknown values are refused.

The gateway's settings come from its settings model, so that invalid ones are refused when the chart
is rendered instead of when a pod starts.
"""

from __future__ import annotations

from typing import Any

from ep_serve.gateway.settings import GatewaySettings

Schema = dict[str, Any]

CHART_OWNED = {
    "": ("host", "port", "upstreams", "upstream_api_key", "keys_file", "allow_anonymous"),
    "sections": ("metrics", "internal"),
    "StoreSettings": ("path", "quota_bytes"),
    "S3Settings": ("access_key_id", "secret_access_key"),
}
"""Settings of the gateway that the chart sets: addresses, ports, paths and secrets."""

QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"
HTTP_URL = r"^https?://[^\s]+$"
DOWNLOAD = r"^$|^https://[^\s]+$|^hf://[\w.-]+/[\w.-]+@[0-9a-f]{40}$"


def closed(properties: Schema, **more: Any) -> Schema:
    """An object that has these properties and no others."""
    return {"type": "object", "additionalProperties": False, "properties": properties, **more}


def text(pattern: str | None = None, *, empty: bool = True, maximum: int = 253) -> Schema:
    schema: Schema = {"type": "string", "maxLength": maximum}
    if pattern:
        schema["pattern"] = f"^$|{pattern}" if empty and not pattern.startswith("^$") else pattern
    elif not empty:
        schema["minLength"] = 1
    return schema


def integer(minimum: int, maximum: int) -> Schema:
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def optional(schema: Schema) -> Schema:
    """The same, or null for the default of the program."""
    return {**schema, "type": [schema["type"], "null"]}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


def listed(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


SWITCH: Schema = {"type": "boolean"}
SHARE: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": 1}
POSITIVE: Schema = {"type": "number", "exclusiveMinimum": 0}
STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
SECRET = text(DNS_NAME)
SIZE = text(QUANTITY, empty=False)
NAMED_OBJECTS = listed({"type": "object", "required": ["name"]})
OBJECTS = listed({"type": "object", "minProperties": 1})
RESOURCES = closed(
    {
        "requests": {"$ref": "#/$defs/quantities"},
        "limits": {"$ref": "#/$defs/quantities"},
    }
)
QUANTITIES: Schema = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number"], "pattern": QUANTITY},
}
SCHEDULING: Schema = {
    "topologySpread": SWITCH,
    "priorityClassName": text(DNS_NAME),
    "nodeSelector": STRINGS,
    "tolerations": OBJECTS,
    "affinity": closed({"nodeAffinity": {}, "podAffinity": {}, "podAntiAffinity": {}}),
    "podAnnotations": STRINGS,
}

IMAGE = closed(
    {
        "repository": text(r"^[a-z0-9]([a-z0-9._/:-]*[a-z0-9])?$", empty=False),
        "tag": text(r"^[\w][\w.-]{0,127}$"),
        "digest": text(r"^sha256:[0-9a-f]{64}$"),
        "pullPolicy": one_of("Always", "IfNotPresent", "Never"),
    }
)

REDUCTION = closed(
    {
        "keepRatio": optional(SHARE),
        "sieve": optional(text(r"^[a-z][a-z0-9_-]*$", empty=False)),
        "fps": optional({**POSITIVE, "maximum": 30}),
        "maxFps": optional({**POSITIVE, "maximum": 60}),
        "maxFrames": optional(integer(2, 100_000)),
        "minPixels": optional(integer(784, 1 << 30)),
        "maxPixels": optional(integer(784, 1 << 30)),
        "maxFullTokens": optional(integer(1, 1 << 30)),
        "towerCacheGib": optional({"type": "number", "minimum": 0}),
        "mediaCacheGib": optional({"type": "number", "minimum": 0}),
    }
)

ENGINE = closed(
    {
        "checkpoint": closed(
            {
                "path": text(r"^/[^\s]+$"),
                "embedded": SWITCH,
                "download": closed(
                    {
                        "source": text(DOWNLOAD, maximum=2_048),
                        "sha256": text(r"^[0-9a-f]{64}$"),
                        "tokenSecret": SECRET,
                    }
                ),
            }
        ),
        "servedName": text(r"^[\w][\w./:-]*$"),
        "replicas": integer(0, 1_000),
        "gpus": integer(0, 16),
        "gpuResource": text(r"^[a-z0-9.-]+/[\w.-]+$", empty=False),
        "reduction": REDUCTION,
        "options": {
            "type": "object",
            "propertyNames": {"pattern": r"^[a-z][a-z0-9-]*$"},
            "additionalProperties": {"type": ["string", "number", "boolean"]},
        },
        "env": NAMED_OBJECTS,
        "apiKeySecret": SECRET,
        "resources": RESOURCES,
        "shmSize": SIZE,
        "scratchSize": SIZE,
        "startupSeconds": integer(10, 86_400),
        "drain": closed(
            {"preStopSeconds": integer(1, 3_600), "shutdownSeconds": integer(1, 86_400)}
        ),
        "modelCache": closed(
            {
                "existingClaim": text(DNS_NAME),
                "size": text(QUANTITY),
                "storageClass": optional(text(DNS_NAME, empty=False)),
                "accessModes": listed(
                    one_of("ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany", "ReadOnlyMany"),
                    minItems=1,
                    uniqueItems=True,
                ),
                "keep": SWITCH,
            }
        ),
        "autoscaling": closed(
            {
                "kind": one_of("", "keda", "hpa"),
                "minReplicas": integer(1, 1_000),
                "maxReplicas": integer(1, 1_000),
                "requestsPerReplica": integer(1, 100_000),
                "kvCacheUse": SHARE,
                "scaleDownSeconds": integer(60, 3_600),
            }
        ),
        "maxSurge": integer(0, 100),
        "runtimeClassName": text(DNS_NAME),
        **SCHEDULING,
    }
)

GATEWAY = closed(
    {
        "replicas": integer(1, 100),
        "keysSecret": SECRET,
        "allowAnonymous": SWITCH,
        "settings": {"$ref": "#/$defs/gatewaySettings"},
        "store": closed(
            {
                "sizeGiB": integer(1, 1 << 20),
                "persistent": SWITCH,
                "existingClaim": text(DNS_NAME),
                "storageClass": optional(text(DNS_NAME, empty=False)),
                "s3Secret": SECRET,
            }
        ),
        "resources": RESOURCES,
        "service": closed(
            {
                "type": one_of("ClusterIP", "NodePort", "LoadBalancer"),
                "port": integer(1, 65_535),
                "annotations": STRINGS,
            }
        ),
        **SCHEDULING,
    }
)

PEERS = listed(closed({"podSelector": {}, "namespaceSelector": {}, "ipBlock": {}}, minProperties=1))
EGRESS = listed(closed({"to": PEERS, "ports": OBJECTS}, minProperties=1))

MONITORING = closed(
    {
        "monitors": SWITCH,
        "interval": text(r"^[0-9]+(ms|s|m)$", empty=False),
        "labels": STRINGS,
        "prometheusUrl": text(HTTP_URL, empty=False),
        "rules": closed(
            {
                "enabled": SWITCH,
                "runbookUrl": text(r"^[^\s#]+$", empty=False, maximum=2_048),
                "errorBudget": {**SHARE, "maximum": 0.06},
                "ttftSeconds": {"enum": [0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]},
                "ttftObjective": {"type": "number", "minimum": 0.94, "exclusiveMaximum": 1},
                "kvCacheUse": SHARE,
                "preemptionsPerSecond": POSITIVE,
                "storeUse": SHARE,
                "towerHitsLeft": SHARE,
            }
        ),
        "dashboards": closed({"enabled": SWITCH, "labels": STRINGS}),
    }
)


def values_schema(comments: dict[str, str]) -> Schema:
    """The whole schema; `comments` are the descriptions of values by dotted name."""
    schema = closed(
        {
            "nameOverride": text(DNS_LABEL, maximum=30),
            "fullnameOverride": text(DNS_LABEL, maximum=30),
            "commonLabels": STRINGS,
            "images": closed(
                {"pullSecrets": listed(text(DNS_NAME, empty=False)), "engine": IMAGE,
                 "gateway": IMAGE}
            ),
            "engine": {"$ref": "#/$defs/engine"},
            "models": {
                "type": "object",
                "propertyNames": {"pattern": DNS_LABEL, "maxLength": 24},
                "additionalProperties": {"$ref": "#/$defs/engine"},
            },
            "gateway": GATEWAY,
            "ingress": closed(
                {
                    "enabled": SWITCH,
                    "className": text(DNS_NAME),
                    "host": text(DNS_NAME),
                    "tlsSecret": SECRET,
                    "nginxAnnotations": SWITCH,
                    "annotations": STRINGS,
                }
            ),
            "httpRoute": closed(
                {
                    "enabled": SWITCH,
                    "parentRefs": NAMED_OBJECTS,
                    "hostnames": listed(text(r"^(\*\.)?[a-z0-9][-.a-z0-9]*$", empty=False)),
                    "nginxBodySize": SWITCH,
                }
            ),
            "networkPolicy": closed(
                {
                    "enabled": SWITCH,
                    "clients": PEERS,
                    "prometheus": PEERS,
                    "dns": {**PEERS, "minItems": 1},
                    "exceptNetworks": listed(text(r"^[0-9a-fA-F.:]+/[0-9]{1,3}$", empty=False)),
                    "gatewayEgress": EGRESS,
                }
            ),
            "monitoring": MONITORING,
            "tests": closed({"apiKeySecret": SECRET}),
            "global": {"type": "object"},
        }
    )  # fmt: skip
    definitions = {
        "engine": ENGINE,
        "quantities": QUANTITIES,
        "gatewaySettings": gateway_settings(),
    }
    for name, comment in comments.items():
        _describe(schema, definitions, name.split("."), comment)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Values of the chart ep-serve",
        **schema,
        "$defs": definitions,
    }


def gateway_settings() -> Schema:
    """The schema of the gateway's settings without those that the chart sets."""
    whole = GatewaySettings.model_json_schema()
    sections = whole.pop("$defs")
    for name in (*CHART_OWNED[""], *CHART_OWNED["sections"]):
        whole["properties"].pop(name)
    for section in ("StoreSettings", "S3Settings"):
        for name in CHART_OWNED[section]:
            sections[section]["properties"].pop(name)
    found: Schema = _plain(whole, sections)
    found["required"] = ["request_timeout_s", "media", "drain"]  # templates read them
    return found


def _plain(node: Any, sections: Schema) -> Any:
    """Without references, titles and defaults; durations and sizes may be written as numbers."""
    if isinstance(node, list):
        return [_plain(item, sections) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _plain(sections[node["$ref"].rsplit("/", 1)[1]], sections)
    if "properties" in node:
        properties = {name: _plain(item, sections) for name, item in node["properties"].items()}
        return closed(properties, **{k: v for k, v in node.items() if k == "required"})
    kept = {name: item for name, item in node.items() if name not in {"title", "default"}}
    return {name: _plain(item, sections) for name, item in kept.items()}


def _describe(schema: Schema, definitions: Schema, names: list[str], comment: str) -> None:
    for name in names:
        if "$ref" in schema:
            schema = definitions[schema["$ref"].rsplit("/", 1)[1]]
        properties = schema.get("properties", {})
        if name not in properties:
            raise KeyError(f"values.yaml has {'.'.join(names)}, the schema has not")
        # Schemas are shared between places: a description belongs to one of them.
        properties[name] = schema = dict(properties[name])
        if "properties" in schema:
            schema["properties"] = dict(schema["properties"])
    schema["description"] = comment
