"""Schemas of the custom resources that the chart renders: the fields it uses, and no others.

Written after the definitions of prometheus-operator 0.9x, KEDA 2.1x, Gateway API 1.x and NGINX
Gateway Fabric 2.x. A field that is not here may well exist there; add it when the chart uses it.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
WHOLE: Schema = {"type": "integer", "minimum": 0}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
DURATION: Schema = {"type": "string", "pattern": r"^([0-9]+(ms|s|m|h|d))+$"}


def closed(required: str = "", **properties: Schema) -> Schema:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": required.split(),
        "properties": properties,
    }


def listed(items: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": items}


def resource(spec: Schema) -> Schema:
    metadata = closed("name labels", name=TEXT, namespace=TEXT, labels=LABELS, annotations=LABELS)
    return closed(
        "apiVersion kind metadata spec", apiVersion=TEXT, kind=TEXT, metadata=metadata, spec=spec
    )


POD_MONITOR = closed(
    "selector podMetricsEndpoints",
    selector=closed("matchLabels", matchLabels=LABELS),
    podTargetLabels=listed(TEXT),
    podMetricsEndpoints=listed(
        closed(
            "port",
            port=TEXT,
            path=TEXT,
            interval=DURATION,
            relabelings=listed(
                closed(
                    "targetLabel replacement",
                    action={"const": "replace"},
                    targetLabel={"type": "string", "pattern": "^[a-zA-Z_][a-zA-Z0-9_]*$"},
                    replacement=TEXT,
                )
            ),
        )
    ),
)

RULE: Schema = {
    "oneOf": [
        closed(
            "record expr", record={"type": "string", "pattern": "^[a-zA-Z_:][\\w:]*$"}, expr=TEXT
        ),
        closed(
            "alert expr for labels annotations",
            alert=TEXT,
            expr=TEXT,
            **{"for": DURATION},
            labels=closed("severity", severity={"enum": ["critical", "warning"]}),
            annotations=closed(
                "summary description runbook_url",
                summary=TEXT,
                description=TEXT,
                runbook_url=TEXT,
            ),
        ),
    ]
}
PROMETHEUS_RULE = closed(
    "groups", groups=listed(closed("name rules", name=TEXT, rules=listed(RULE)))
)

POLICY = closed(
    "type value periodSeconds",
    type={"enum": ["Pods", "Percent"]},
    value={"type": "integer", "minimum": 1},
    periodSeconds={"type": "integer", "minimum": 1, "maximum": 1800},
)
SCALING = closed(
    "stabilizationWindowSeconds policies",
    stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
    policies=listed(POLICY),
)
SCALED_OBJECT = closed(
    "scaleTargetRef triggers",
    scaleTargetRef=closed("name", apiVersion=TEXT, kind=TEXT, name=TEXT),
    minReplicaCount=WHOLE,
    maxReplicaCount=WHOLE,
    pollingInterval=WHOLE,
    fallback=closed(
        "failureThreshold replicas",
        failureThreshold=WHOLE,
        replicas=WHOLE,
        behavior={"enum": ["static", "currentReplicas", "currentReplicasIfHigher"]},
    ),
    advanced=closed(
        horizontalPodAutoscalerConfig=closed(behavior=closed(scaleUp=SCALING, scaleDown=SCALING))
    ),
    triggers=listed(
        closed(
            "type metadata",
            type={"const": "prometheus"},
            name=TEXT,
            metricType={"enum": ["AverageValue", "Value"]},
            metadata=closed(
                "serverAddress query threshold",
                serverAddress={"type": "string", "pattern": "^https?://"},
                query=TEXT,
                threshold={"type": "string", "pattern": r"^[0-9.]+$"},
                ignoreNullValues={"enum": ["true", "false"]},
            ),
        )
    ),
)

GATEWAY_DURATION: Schema = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
PATH = closed("type value", type={"enum": ["PathPrefix", "Exact"]}, value=TEXT)
HTTP_ROUTE = closed(
    "parentRefs rules",
    parentRefs=listed(closed("name", name=TEXT, namespace=TEXT, sectionName=TEXT)),
    hostnames=listed(TEXT),
    rules=listed(
        closed(
            "backendRefs",
            matches=listed(closed("path", path=PATH)),
            timeouts=closed(request=GATEWAY_DURATION, backendRequest=GATEWAY_DURATION),
            backendRefs=listed(closed("name port", name=TEXT, port={"type": "integer"})),
        )
    ),
)

CLIENT_SETTINGS = closed(
    "targetRef",
    targetRef=closed(
        "group kind name",
        group={"const": "gateway.networking.k8s.io"},
        kind={"enum": ["Gateway", "HTTPRoute"]},
        name=TEXT,
    ),
    body=closed("maxSize", maxSize={"type": "string", "pattern": "^[0-9]{1,4}[kmg]?$"}),
)

SCHEMAS = {
    ("monitoring.coreos.com/v1", "PodMonitor"): resource(POD_MONITOR),
    ("monitoring.coreos.com/v1", "PrometheusRule"): resource(PROMETHEUS_RULE),
    ("keda.sh/v1alpha1", "ScaledObject"): resource(SCALED_OBJECT),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): resource(HTTP_ROUTE),
    ("gateway.nginx.org/v1alpha1", "ClientSettingsPolicy"): resource(CLIENT_SETTINGS),
}
