"""What the chart makes of the gateway, the network and the ways in."""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Any

import pytest

from ep_serve.gateway.settings import GatewaySettings, load
from tests.deploy.chart import EXAMPLES, Object, Rendered, example, merged, render, small


def config(rendered: Rendered) -> Object:
    """The gateway's settings as it reads them."""
    text = rendered.get("ConfigMap", "gateway")["data"]["gateway.json"]
    result: Object = json.loads(text)
    return result


def gateway(**values: Any) -> Rendered:
    return render(small(gateway=values))


# --- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_gateway_takes_its_settings(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The pod's own address is known when it runs: the Deployment gives it in the environment.
    monkeypatch.setenv("EP_SERVE_GATEWAY_INTERNAL__URL", "http://10.0.0.1:8081")
    written = tmp_path / "gateway.json"
    written.write_text(render(file).get("ConfigMap", "gateway")["data"]["gateway.json"])
    settings = load(written)
    assert isinstance(settings, GatewaySettings)
    assert settings.host == "0.0.0.0"


def test_every_model_is_an_upstream() -> None:
    assert config(example("multi-tenant"))["upstreams"] == [
        "http://rel-ep-serve-engine-omni-3b:8000",
        "http://rel-ep-serve-engine-omni-7b:8000",
    ]


def test_settings_keep_what_is_not_overridden() -> None:
    found = config(gateway(settings={"media": {"fetch": {"enabled": False}}}))
    assert found["media"]["fetch"] == {"enabled": False, "ports": [80, 443]}
    assert found["request_timeout_s"] == 600


def test_the_settings_of_the_values_are_the_gateways_own_defaults() -> None:
    found = config(gateway())
    fields = GatewaySettings.model_fields
    assert found["media"]["max_bytes"] == fields["media"].default.max_bytes
    assert found["media"]["fetch"]["ports"] == list(fields["media"].default.fetch.ports)
    assert found["request_timeout_s"] == fields["request_timeout_s"].default


def test_the_quota_fits_the_store() -> None:
    rendered = gateway(store={"sizeGiB": 100})
    quota = config(rendered)["store"]["quota_bytes"]
    assert quota == 75 * 2**30
    assert quota + quota // 4 <= 100 * 2**30  # what media in use may take beside files
    (volume,) = [v for v in rendered.pod("gateway")["volumes"] if v["name"] == "store"]
    assert volume["emptyDir"]["sizeLimit"] == "100Gi"


def test_keys_come_from_a_secret() -> None:
    rendered = gateway()
    assert config(rendered)["keys_file"] == "/etc/ep-serve-keys/keys.yaml"
    (volume,) = [v for v in rendered.pod("gateway")["volumes"] if v["name"] == "keys"]
    assert volume["secret"]["secretName"] == "keys"


def test_everybody_is_served_only_on_request() -> None:
    assert config(gateway())["allow_anonymous"] is False
    rendered = gateway(keysSecret="", allowAnonymous=True)
    assert config(rendered)["allow_anonymous"] is True
    assert "keys_file" not in config(rendered)


def test_a_change_of_the_settings_starts_new_pods() -> None:
    def checksum(rendered: Rendered) -> str:
        template = rendered.get("Deployment", "gateway")["spec"]["template"]
        result: str = template["metadata"]["annotations"]["checksum/config"]
        return result

    before = checksum(gateway())
    assert checksum(gateway(settings={"queue": {"timeout_s": 3}})) != before
    assert checksum(gateway(replicas=3)) == before


def test_engines_fetch_media_from_the_pod_that_has_them() -> None:
    names = {item["name"]: item for item in gateway().container("gateway")["env"]}
    assert names["POD_IP"]["valueFrom"]["fieldRef"]["fieldPath"] == "status.podIP"
    assert names["EP_SERVE_GATEWAY_INTERNAL__URL"]["value"] == "http://$(POD_IP):8081"
    assert list(names).index("POD_IP") == 0  # a variable is known to those after it


def test_metrics_and_media_are_not_on_the_service() -> None:
    ports = gateway().get("Service", "gateway")["spec"]["ports"]
    assert [port["targetPort"] for port in ports] == ["http"]


# --- probes, the end, the store ---------------------------------------------------------------


def test_readiness_and_liveness_are_different_questions() -> None:
    container = gateway().container("gateway")
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"


@pytest.mark.parametrize(("delay", "timeout"), [(10, 300), (0.5, 7.2)])
def test_the_gateway_is_not_ready_before_it_ends(delay: float, timeout: float) -> None:
    rendered = gateway(settings={"drain": {"delay_s": delay, "timeout_s": timeout}})
    assert rendered.pod("gateway")["terminationGracePeriodSeconds"] > delay + timeout


def test_readiness_turns_within_the_delay() -> None:
    rendered = gateway()
    probe = rendered.container("gateway")["readinessProbe"]
    seconds = probe["periodSeconds"] * probe["failureThreshold"] + probe["timeoutSeconds"]
    assert seconds < config(rendered)["drain"]["delay_s"]


def test_engines_leave_after_the_gateway_has_noticed() -> None:
    routing = GatewaySettings.model_fields["routing"].default
    hook = render(small()).container("engine-a")["lifecycle"]["preStop"]
    name_ttl_s = 5  # of records of the cluster's name service
    assert hook["sleep"]["seconds"] > routing.dns_interval_s + name_ttl_s


def test_a_persistent_store_has_one_owner_at_a_time() -> None:
    rendered = example("air-gapped")
    assert rendered.get("Deployment", "gateway")["spec"]["strategy"] == {"type": "Recreate"}
    claim = rendered.get("PersistentVolumeClaim", "gateway-store")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["spec"]["storageClassName"] == "fast"


def test_an_existing_store_is_used() -> None:
    rendered = gateway(store={"persistent": True, "existingClaim": "media"})
    (volume,) = [v for v in rendered.pod("gateway")["volumes"] if v["name"] == "store"]
    assert volume["persistentVolumeClaim"]["claimName"] == "media"
    assert not rendered.all("PersistentVolumeClaim")


def test_several_gateways() -> None:
    two = gateway(replicas=2)
    assert two.has("PodDisruptionBudget", "gateway")
    assert two.get("Service", "gateway")["spec"]["sessionAffinity"] == "ClientIP"
    one = gateway(replicas=1)
    assert not one.has("PodDisruptionBudget", "gateway")
    assert "sessionAffinity" not in one.get("Service", "gateway")["spec"]


def test_several_gateways_share_a_bucket() -> None:
    s3 = {"bucket": "media", "endpoint": "https://s3.example.org"}
    settings = {"store": {"s3": s3, "file_ttl_s": 60}}
    rendered = gateway(replicas=2, settings=settings, store={"s3Secret": "bucket-keys"})
    found = config(rendered)["store"]
    assert found["s3"] == s3
    assert found["path"] == "/store"
    assert "sessionAffinity" not in rendered.get("Service", "gateway")["spec"]
    names = {item["name"]: item for item in rendered.container("gateway")["env"]}
    for variable, key in (("ACCESS_KEY_ID", "access-key-id"), ("SECRET_ACCESS_KEY",) * 2):
        source = names[f"EP_SERVE_GATEWAY_STORE__S3__{variable}"]["valueFrom"]["secretKeyRef"]
        assert source == {"name": "bucket-keys", "key": key.lower().replace("_", "-")}


def test_the_keys_of_a_bucket_come_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EP_SERVE_GATEWAY_INTERNAL__URL", "http://10.0.0.1:8081")
    monkeypatch.setenv("EP_SERVE_GATEWAY_STORE__S3__ACCESS_KEY_ID", "id")
    monkeypatch.setenv("EP_SERVE_GATEWAY_STORE__S3__SECRET_ACCESS_KEY", "secret")
    written = tmp_path / "gateway.json"
    written.write_text(json.dumps(config(gateway(settings={"store": {"s3": {"bucket": "b"}}}))))
    s3 = load(written).store.s3
    assert s3 is not None
    assert s3.secret_access_key is not None
    assert (s3.bucket, s3.secret_access_key.get_secret_value()) == ("b", "secret")


# --- the network ------------------------------------------------------------------------------


def egress_networks(policy: Object) -> list[Object]:
    return [
        peer["ipBlock"]
        for rule in policy["spec"].get("egress", ())
        for peer in rule["to"]
        if "ipBlock" in peer
    ]


def components(peers: list[Object]) -> set[str]:
    return {p["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for p in peers}


def test_every_pod_denies_traffic_by_default() -> None:
    policy = gateway().get("NetworkPolicy", "deny")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy
    assert "egress" not in policy
    labels = policy["podSelector"]["matchLabels"]
    assert labels.keys() == {"app.kubernetes.io/name", "app.kubernetes.io/instance"}


def test_only_the_gateway_reaches_engines() -> None:
    (rule,) = gateway().get("NetworkPolicy", "engine")["spec"]["ingress"]
    assert components(rule["from"]) == {"gateway"}
    assert rule["ports"] == [{"protocol": "TCP", "port": 8000}]


def test_an_engine_reaches_names_and_the_gateway_and_nothing_else() -> None:
    policy = gateway().get("NetworkPolicy", "engine")
    names, media = policy["spec"]["egress"]
    assert {port["port"] for port in names["ports"]} == {53}
    assert components(media["to"]) == {"gateway"}
    assert media["ports"] == [{"protocol": "TCP", "port": 8081}]


def test_the_gateway_reaches_what_is_named() -> None:
    rule = {
        "to": [{"podSelector": {"matchLabels": {"app": "minio"}}}],
        "ports": [{"protocol": "TCP", "port": 9000}],
    }
    rendered = render(small(networkPolicy={"gatewayEgress": [rule]}))
    assert rule in rendered.get("NetworkPolicy", "gateway")["spec"]["egress"]
    assert rule not in rendered.get("NetworkPolicy", "engine")["spec"]["egress"]


def test_an_engine_that_downloads_reaches_public_servers() -> None:
    policy = example("single-gpu").get("NetworkPolicy", "engine")
    assert egress_networks(policy)
    assert policy["spec"]["egress"][-1]["ports"] == [{"protocol": "TCP", "port": 443}]


PRIVATE = [
    *("10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "127.0.0.1", "169.254.169.254"),
    *("0.0.0.1", "224.0.0.1", "255.255.255.255", "198.18.0.1"),
    *("::1", "fd00:ec2::254", "fe80::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1"),
    *("2002:a00:1::", "2001:db8::1"),
]


def reachable(address: str, blocks: list[Object]) -> bool:
    found = ipaddress.ip_address(address)
    return any(
        found in ipaddress.ip_network(block["cidr"])
        and not any(found in ipaddress.ip_network(item) for item in block["except"])
        for block in blocks
    )


@pytest.mark.parametrize("address", PRIVATE)
def test_the_gateway_does_not_reach_private_addresses(address: str) -> None:
    assert not reachable(address, egress_networks(gateway().get("NetworkPolicy", "gateway")))


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1"])
def test_the_gateway_reaches_the_internet(address: str) -> None:
    assert reachable(address, egress_networks(gateway().get("NetworkPolicy", "gateway")))


def test_own_public_networks_can_be_left_out() -> None:
    values = merged(small(), {"networkPolicy": {"exceptNetworks": ["93.184.0.0/16"]}})
    blocks = egress_networks(render(values).get("NetworkPolicy", "gateway"))
    assert not reachable("93.184.216.34", blocks)


def test_exceptions_lie_inside_what_they_are_excepted_from() -> None:
    for block in egress_networks(gateway().get("NetworkPolicy", "gateway")):
        whole = ipaddress.ip_network(block["cidr"])
        for item in block["except"]:
            assert ipaddress.ip_network(item).subnet_of(whole)  # type: ignore[arg-type]


def test_without_fetching_there_is_no_way_out() -> None:
    assert not egress_networks(example("air-gapped").get("NetworkPolicy", "gateway"))


def test_the_gateways_ingress_rules() -> None:
    rules = gateway().get("NetworkPolicy", "gateway")["spec"]["ingress"]
    by_port = {rule["ports"][0]["port"]: rule for rule in rules}
    assert by_port.keys() == {8080, 8081}
    assert "from" not in by_port[8080]
    assert components(by_port[8081]["from"]) == {"engine"}


def test_clients_and_prometheus_are_named() -> None:
    rules = example("tensor-parallel").get("NetworkPolicy", "gateway")["spec"]["ingress"]
    by_port = {rule["ports"][0]["port"]: rule["from"] for rule in rules}
    assert by_port[8080][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "test"
    namespaces = [peer["namespaceSelector"] for peer in by_port[8080][1:]]
    assert namespaces == [{"matchLabels": {"kubernetes.io/metadata.name": "ingress-nginx"}}]
    assert "namespaceSelector" in by_port[9090][0]


def test_policies_can_be_disabled() -> None:
    assert not render(small(networkPolicy={"enabled": False})).all("NetworkPolicy")


# --- ways in ----------------------------------------------------------------------------------


def test_nothing_is_opened_to_the_outside_by_default() -> None:
    rendered = gateway()
    assert not rendered.all("Ingress")
    assert not rendered.all("HTTPRoute")
    assert rendered.get("Service", "gateway")["spec"]["type"] == "ClusterIP"


def test_an_ingress_lets_videos_and_streams_through() -> None:
    ingress = example("tensor-parallel").get("Ingress", "gateway")
    annotations = ingress["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io/"
    assert annotations[f"{prefix}proxy-body-size"] == "513m"
    assert annotations[f"{prefix}proxy-read-timeout"] == "600"
    assert annotations[f"{prefix}proxy-buffering"] == "off"
    assert annotations[f"{prefix}proxy-request-buffering"] == "off"
    assert ingress["spec"]["tls"] == [{"hosts": ["omni.example.org"], "secretName": "omni-tls"}]


def test_only_the_api_is_routed() -> None:
    (rule,) = example("tensor-parallel").get("Ingress", "gateway")["spec"]["rules"]
    assert [path["path"] for path in rule["http"]["paths"]] == ["/v1"]
    (rule,) = example("replicas").get("HTTPRoute", "gateway")["spec"]["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]


def test_a_playground_that_is_switched_on_is_routed_too() -> None:
    values = small(gateway={"settings": {"playground": {"enabled": True}}})
    values["ingress"] = {"enabled": True, "host": "x.org"}
    values["httpRoute"] = {"enabled": True, "parentRefs": [{"name": "public"}]}
    rendered = render(values)
    (rule,) = rendered.get("Ingress", "gateway")["spec"]["rules"]
    assert [path["path"] for path in rule["http"]["paths"]] == ["/v1", "/playground"]
    (rule,) = rendered.get("HTTPRoute", "gateway")["spec"]["rules"]
    assert [match["path"]["value"] for match in rule["matches"]] == ["/v1", "/playground"]


def test_other_controllers_get_no_annotations_of_nginx() -> None:
    values = {"enabled": True, "host": "x.org", "nginxAnnotations": False}
    ingress = render(small(ingress=values)).get("Ingress", "gateway")
    assert not ingress["metadata"]["annotations"]


def test_a_route_waits_as_long_as_a_request_may_take() -> None:
    values = merged(small(gateway={"settings": {"request_timeout_s": 900}}), {})
    values["httpRoute"] = {"enabled": True, "parentRefs": [{"name": "public"}]}
    (rule,) = render(values).get("HTTPRoute", "gateway")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "900s", "backendRequest": "900s"}


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({}, "513m"),
        ({"media": {"max_bytes": 10 << 20}, "request": {"max_body_bytes": 99 << 20}}, "100m"),
        ({"media": {"max_bytes": 64 << 30}}, "65g"),
    ],
)
def test_nginx_lets_every_body_through_that_the_gateway_takes(settings: Object, size: str) -> None:
    values = small(gateway={"settings": settings})
    values["ingress"] = {"enabled": True, "host": "x.org"}
    values["httpRoute"] = {
        "enabled": True,
        "parentRefs": [{"name": "public"}],
        "nginxBodySize": True,
    }
    rendered = render(values)
    annotations = rendered.get("Ingress", "gateway")["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-body-size"] == size
    policy = rendered.get("ClientSettingsPolicy", "gateway")["spec"]
    assert policy["body"] == {"maxSize": size}
    assert policy["targetRef"]["kind"] == "HTTPRoute"
    assert policy["targetRef"]["name"] == rendered.get("HTTPRoute", "gateway")["metadata"]["name"]
