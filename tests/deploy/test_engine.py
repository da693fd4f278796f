"""What the chart makes of a model."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.deploy.chart import ROOT, Object, example, render, small

ENGINE = "engine-a"


def container(**model: Any) -> Object:
    return render(small(model=model)).container(ENGINE)


def option(arguments: list[str], name: str) -> str:
    """The value of `--name=value`."""
    (found,) = [word for word in arguments if word.split("=")[0] == f"--{name}"]
    return found.partition("=")[2]


def environment(container: Object) -> dict[str, Any]:
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in container["env"]}


# --- the command ------------------------------------------------------------------------------


def test_an_engine_serves_its_checkpoint_under_the_models_name() -> None:
    args = container()["args"]
    assert args[:2] == ["serve", "/models/a"]
    assert option(args, "served-model-name") == "a"
    assert option(args, "port") == "8000"


def test_null_values_keep_the_default_of_the_program() -> None:
    assert not [word for word in container()["args"] if "keep-ratio" in word or "fps" in word]


def test_the_reduction_becomes_options_and_large_numbers_stay_whole() -> None:
    args = container(reduction={"keepRatio": 0.05, "maxPixels": 1_003_520})["args"]
    assert option(args, "keep-ratio") == "0.05"
    assert option(args, "max-pixels") == "1003520"


def test_options_of_vllm_are_passed_on() -> None:
    options = {"max-model-len": 1_048_576, "enforce-eager": True, "dtype": "float16"}
    args = container(options=options | {"enable-prefix-caching": False})["args"]
    assert option(args, "max-model-len") == "1048576"
    assert option(args, "dtype") == "float16"
    assert "--enforce-eager" in args
    assert "--no-enable-prefix-caching" in args


def test_a_models_zero_overrides_the_default() -> None:
    rendered = render(small(model={"gpus": 0}, engine={"gpus": 2}))
    assert "nvidia.com/gpu" not in rendered.container(ENGINE)["resources"]["limits"]
    assert "tolerations" not in rendered.pod(ENGINE)


# --- GPUs -------------------------------------------------------------------------------------


def test_gpus_are_asked_for_tolerated_and_used_together() -> None:
    rendered = render(small(model={"gpus": 4}))
    engine = rendered.container(ENGINE)
    assert engine["resources"]["limits"]["nvidia.com/gpu"] == 4
    assert engine["resources"]["requests"]["nvidia.com/gpu"] == 4
    assert option(engine["args"], "tensor-parallel-size") == "4"
    assert rendered.pod(ENGINE)["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_another_gpu_resource_and_runtime_class() -> None:
    pod = render(small(model={"gpuResource": "amd.com/gpu", "runtimeClassName": "rocm"})).pod(
        ENGINE
    )
    assert pod["containers"][0]["resources"]["limits"]["amd.com/gpu"] == 1
    assert pod["runtimeClassName"] == "rocm"


def test_shared_memory_is_as_large_as_asked_for() -> None:
    pod = render(small(model={"shmSize": "3Gi"})).pod(ENGINE)
    (volume,) = [item for item in pod["volumes"] if item["name"] == "shm"]
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "3Gi"}
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


# --- probes and the end -----------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [10, 601, 1_800])
def test_the_startup_probe_waits_for_the_weights(seconds: int) -> None:
    probe = container(startupSeconds=seconds)["startupProbe"]
    waited = probe["periodSeconds"] * probe["failureThreshold"]
    assert seconds <= waited < seconds + probe["periodSeconds"]


def test_a_rollout_does_not_time_out_while_weights_load() -> None:
    spec = render(small(model={"startupSeconds": 3_600})).get("Deployment", ENGINE)["spec"]
    assert spec["progressDeadlineSeconds"] > 3_600


def test_an_engine_that_hangs_is_taken_out_first_and_restarted_later() -> None:
    engine = container()
    for probe in ("readinessProbe", "livenessProbe"):
        assert engine[probe]["httpGet"]["path"] == "/health"
    ready, alive = (
        engine[probe]["periodSeconds"] * engine[probe]["failureThreshold"]
        for probe in ("readinessProbe", "livenessProbe")
    )
    assert ready < 30
    assert alive >= 60


@pytest.mark.parametrize(("pre_stop", "shutdown"), [(1, 1), (20, 120), (60, 3_000)])
def test_the_grace_period_is_longer_than_everything_in_it(pre_stop: int, shutdown: int) -> None:
    drain = {"preStopSeconds": pre_stop, "shutdownSeconds": shutdown}
    pod = render(small(model={"drain": drain})).pod(ENGINE)
    engine = pod["containers"][0]
    slept = engine["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert slept == pre_stop
    assert option(engine["args"], "shutdown-timeout") == str(shutdown)
    assert pod["terminationGracePeriodSeconds"] >= slept + shutdown + seconds_to_end()


def seconds_to_end() -> float:
    """What the server takes at most after `--shutdown-timeout`, by its own limits.

    They are read from the sources: importing them would import vLLM.
    """
    limits = {"drain": "ENGINE_EXIT_SECONDS", "serve": "GRACE_SECONDS"}
    found = 0.0
    for module, name in limits.items():
        text = (ROOT / "ep_serve" / "engine" / "server" / f"{module}.py").read_text()
        value = re.search(rf"^{name} = ([\d.]+)$", text, re.MULTILINE)
        assert value is not None
        found += float(value[1])
    interpreters_end_in = 5.0
    return found + interpreters_end_in


# --- weights ----------------------------------------------------------------------------------


def test_a_checkpoint_that_is_there_needs_no_step() -> None:
    assert "initContainers" not in render(small()).pod(ENGINE)


def test_the_embedded_model_is_written_once_into_a_volume_that_outlives_its_pod() -> None:
    pod = example("cpu-demo").pod("engine-demo")
    (step,) = pod["initContainers"]
    shell, flag, script = step["command"]
    assert (shell, flag) == ("sh", "-c")
    assert script.startswith(f"test -d {pod['containers'][0]['args'][1]} || ep-serve checkpoint ")


def test_a_download_is_checked_by_its_digest_and_named_by_it() -> None:
    rendered = example("single-gpu")
    pod = rendered.pod("engine-omni-7b")
    (step,) = pod["initContainers"]
    digest = step["args"][-1].removeprefix("--sha256=")
    assert step["args"][0].startswith("hf://")
    assert step["args"][1] == f"/models/{digest}" == pod["containers"][0]["args"][1]
    assert environment(step)["HF_TOKEN"]["secretKeyRef"]["name"] == "hugging-face"


def test_the_engine_cannot_write_its_weights() -> None:
    (mount,) = [m for m in container()["volumeMounts"] if m["mountPath"] == "/models"]
    assert mount["readOnly"] is True


def test_the_model_cache_survives_the_release() -> None:
    claim = example("single-gpu").get("PersistentVolumeClaim", "models-omni-7b")
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert claim["spec"]["resources"]["requests"]["storage"] == "40Gi"


def test_a_model_cache_that_need_not_survive() -> None:
    rendered = render(small(model={"modelCache": {"size": "1Gi", "keep": False}}))
    claim = rendered.get("PersistentVolumeClaim", "models-a")
    assert "annotations" not in claim["metadata"]


def test_a_single_node_claim_is_released_before_the_next_pod_starts() -> None:
    one = render(small(model={"modelCache": {"size": "1Gi"}}))
    assert one.get("Deployment", ENGINE)["spec"]["strategy"] == {"type": "Recreate"}
    shared = {"size": "1Gi", "accessModes": ["ReadWriteMany"]}
    many = render(small(model={"modelCache": shared, "replicas": 2}))
    assert many.get("Deployment", ENGINE)["spec"]["strategy"]["type"] == "RollingUpdate"


@pytest.mark.parametrize(("surge", "unavailable"), [(1, 0), (0, 1)])
def test_an_update_never_waits_for_a_gpu_that_does_not_exist(surge: int, unavailable: int) -> None:
    rendered = render(small(model={"maxSurge": surge}))
    update = rendered.get("Deployment", ENGINE)["spec"]["strategy"]["rollingUpdate"]
    assert update == {"maxSurge": surge, "maxUnavailable": unavailable}


# --- the environment --------------------------------------------------------------------------


def test_what_an_engine_writes_goes_to_mounted_folders() -> None:
    engine = container()
    mounts = {mount["mountPath"] for mount in engine["volumeMounts"] if not mount.get("readOnly")}
    assert mounts == {"/scratch", "/tmp", "/dev/shm"}
    found = environment(engine)
    for name in ("HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR"):
        assert found[name].startswith("/scratch")


def test_an_engine_does_not_use_the_network_on_its_own() -> None:
    found = environment(container())
    assert found["HF_HUB_OFFLINE"] == found["VLLM_NO_USAGE_STATS"] == "1"
    assert found["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"


def test_an_engines_key_comes_from_a_secret_and_the_gateway_has_it() -> None:
    rendered = example("air-gapped")
    secret = {"secretKeyRef": {"name": "ep-serve-engine-key", "key": "api-key"}}
    assert environment(rendered.container("engine-omni-7b"))["VLLM_API_KEY"] == secret
    gateway = environment(rendered.container("gateway"))
    assert gateway["EP_SERVE_GATEWAY_UPSTREAM_API_KEY"] == secret


def test_more_variables_can_be_given() -> None:
    engine = container(env=[{"name": "NCCL_DEBUG", "value": "INFO"}])
    assert environment(engine)["NCCL_DEBUG"] == "INFO"


# --- where and how many -----------------------------------------------------------------------


def test_each_model_is_a_deployment_and_a_name_for_its_pods() -> None:
    rendered = example("multi-tenant")
    names = {item["metadata"]["name"] for item in rendered.all("Deployment")}
    assert {"rel-ep-serve-engine-omni-3b", "rel-ep-serve-engine-omni-7b"} < names
    service = rendered.get("Service", "engine-omni-3b")["spec"]
    assert service["clusterIP"] == "None"
    assert service["selector"]["ep-serve/model"] == "omni-3b"


def test_pods_are_spread_where_that_is_possible() -> None:
    spread = render(small()).pod(ENGINE)["topologySpreadConstraints"]
    assert {item["topologyKey"] for item in spread} == {
        "kubernetes.io/hostname",
        "topology.kubernetes.io/zone",
    }
    assert {item["whenUnsatisfiable"] for item in spread} == {"ScheduleAnyway"}
    assert "topologySpreadConstraints" not in render(small(model={"topologySpread": False})).pod(
        ENGINE
    )


def test_pod_placement_can_be_configured() -> None:
    pod = example("multi-tenant").pod("engine-omni-7b")
    assert pod["nodeSelector"] == {"pool": "large"}
    assert {"key": "pool", "value": "large", "effect": "NoSchedule"} in pod["tolerations"]
    assert example("tensor-parallel").pod("engine-omni-7b")["priorityClassName"] == "inference"
    assert "podAntiAffinity" in example("replicas").pod("engine-omni-3b")["affinity"]


@pytest.mark.parametrize(
    ("model", "there"),
    [
        ({"replicas": 1}, False),
        ({"replicas": 2}, True),
        ({"autoscaling": {"kind": "keda", "minReplicas": 1}}, False),
        ({"autoscaling": {"kind": "keda", "minReplicas": 2}}, True),
    ],
)
def test_several_pods_are_not_evicted_at_once(model: Object, there: bool) -> None:
    rendered = render(small(model=model))
    assert rendered.has("PodDisruptionBudget", ENGINE) is there
    if there:
        assert rendered.get("PodDisruptionBudget", ENGINE)["spec"]["maxUnavailable"] == 1


# --- autoscaling ------------------------------------------------------------------------------


def test_an_autoscaler_alone_decides_how_many() -> None:
    scaled = render(small(model={"autoscaling": {"kind": "hpa"}}))
    assert "replicas" not in scaled.get("Deployment", ENGINE)["spec"]
    assert render(small()).get("Deployment", ENGINE)["spec"]["replicas"] == 1


def test_keda_looks_at_requests_then_at_the_kv_cache_never_at_the_gpu() -> None:
    spec = example("replicas").get("ScaledObject", "engine-omni-3b")["spec"]
    requests, cache = (trigger["metadata"]["query"] for trigger in spec["triggers"])
    assert "vllm:num_requests_waiting" in requests
    assert "ep_serve_gateway_queued" in requests
    assert "vllm:kv_cache_usage_perc" in cache
    assert "gpu" not in (requests + cache).lower()
    assert spec["scaleTargetRef"]["name"] == "rel-ep-serve-engine-omni-3b"


def test_missing_metrics_are_not_taken_for_no_load() -> None:
    spec = example("replicas").get("ScaledObject", "engine-omni-3b")["spec"]
    assert {item["metadata"]["ignoreNullValues"] for item in spec["triggers"]} == {"false"}
    assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"


def test_the_gateways_queue_counts_only_where_one_model_can_be_meant() -> None:
    scaling = {"autoscaling": {"kind": "keda"}}
    values = small(model=scaling)
    values["models"]["b"] = {"checkpoint": {"path": "/models/b"}}
    spec = render(values).get("ScaledObject", ENGINE)["spec"]
    assert "queued" not in spec["triggers"][0]["metadata"]["query"]


@pytest.mark.parametrize("kind", ["keda", "hpa"])
def test_pods_go_slowly(kind: str) -> None:
    rendered = render(small(model={"autoscaling": {"kind": kind}}))
    if kind == "keda":
        advanced = rendered.get("ScaledObject", ENGINE)["spec"]["advanced"]
        behavior = advanced["horizontalPodAutoscalerConfig"]["behavior"]
    else:
        behavior = rendered.get("HorizontalPodAutoscaler", ENGINE)["spec"]["behavior"]
    down = behavior["scaleDown"]
    assert down["stabilizationWindowSeconds"] == 600
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 600}]


def test_an_hpa_has_the_same_limits_as_keda() -> None:
    spec = render(small(model={"autoscaling": {"kind": "hpa", "kvCacheUse": 0.75}})).get(
        "HorizontalPodAutoscaler", ENGINE
    )["spec"]
    metrics = {next(iter(m[m["type"].lower()]["metric"].values())): m for m in spec["metrics"]}
    assert metrics["vllm_num_requests"]["pods"]["target"]["averageValue"] == "32"
    assert metrics["vllm_kv_cache_usage_perc"]["pods"]["target"]["averageValue"] == "750m"
    assert "ep_serve_gateway_queued" in metrics
