"""What holds for every pod of every example."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.deploy.chart import EXAMPLES, Object, example, render, small

PODS = {f"{file.stem}: {name}": pod for file in EXAMPLES for name, pod in render(file).pods.items()}
CONTAINERS = {
    f"{name} / {container['name']}": container
    for name, pod in PODS.items()
    for container in (*pod.get("initContainers", ()), *pod["containers"])
}


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_a_pod_meets_the_restricted_pod_security_standard(pod: Object) -> None:
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 10_000
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    allowed = {"emptyDir", "configMap", "secret", "persistentVolumeClaim"}
    assert {kind for volume in pod["volumes"] for kind in volume} - {"name"} <= allowed
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC"}


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_a_pod_has_no_token_and_no_variables_of_services(pod: Object) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_can_do_and_write_little(container: Object) -> None:
    security = container["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_has_bounds(container: Object) -> None:
    assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
    assert container["resources"]["limits"].keys() >= {"cpu", "memory"}


@pytest.mark.parametrize("pod", PODS.values(), ids=PODS)
def test_every_mount_has_a_volume_and_every_volume_a_mount(pod: Object) -> None:
    containers = [*pod.get("initContainers", ()), *pod["containers"]]
    mounted = {mount["name"] for item in containers for mount in item["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_chart_makes_no_secret(file: Path) -> None:
    assert not render(file).all("Secret")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_every_reference_to_an_own_object_is_answered(file: Path) -> None:
    rendered = render(file)
    for pod in rendered.pods.values():
        assert pod["serviceAccountName"] == rendered.get("ServiceAccount")["metadata"]["name"]
        for volume in pod["volumes"]:
            if name := volume.get("configMap", {}).get("name"):
                assert rendered.has("ConfigMap", name.removeprefix("rel-ep-serve-"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_names_are_unique_and_short_enough(file: Path) -> None:
    keys = [(item["kind"], item["metadata"]["name"]) for item in render(file).objects]
    assert len(set(keys)) == len(keys)
    assert all(len(name) <= 63 for _, name in keys)


def test_an_image_is_named_by_its_digest_where_there_is_one() -> None:
    image = example("air-gapped").container("gateway")["image"]
    assert re.fullmatch(r"registry\.example\.internal/ep-serve/gateway@sha256:[0-9a-f]{64}", image)


def test_an_image_without_tag_and_digest_has_the_charts_version() -> None:
    assert render(small()).container("gateway")["image"] == "ep-serve/gateway:0.1.0"


def test_images_are_pulled_with_the_secrets_named() -> None:
    pods = example("air-gapped").pods.values()
    assert all(pod["imagePullSecrets"] == [{"name": "registry"}] for pod in pods)


def test_labels_for_all_objects() -> None:
    rendered = render(small(commonLabels={"team": "video"}))
    assert all(item["metadata"]["labels"]["team"] == "video" for item in rendered.objects)


def test_a_long_release_name_still_gives_names_that_fit() -> None:
    rendered = render({**small(), "fullnameOverride": "a" * 30})
    assert max(len(item["metadata"]["name"]) for item in rendered.objects) <= 63


def test_tests_request_models_a_clip_and_a_stream() -> None:
    pods = example("multi-tenant").all("Pod")
    assert {pod["spec"]["containers"][0]["args"][0] for pod in pods} == {"models", "clip", "stream"}
    for pod in pods:
        assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
        args = pod["spec"]["containers"][0]["args"]
        assert {"--model=omni-3b", "--model=team/omni-7b"} < set(args)
        assert pod["spec"]["containers"][0]["env"][0]["valueFrom"]["secretKeyRef"]
