"""The manifests: rendered by kustomize, checked against Kubernetes' schemas and the code."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from scheduler_service.server import LIVENESS_SERVICE
from tests.deploy.compose import ROOT, configuration
from tests.deploy.manifests import (
    FOLDER,
    OVERLAYS,
    containers,
    environment,
    objects,
    pod,
    rendered,
    tool,
)
from tests.deploy.variables import VARIABLE, default, port, real_variables, settings_of

#: The oldest release with sidecar containers, and a recent one.
KUBERNETES_VERSIONS = ("1.29", "1.34")
#: Fields of podMetricsEndpoints that deploy/ may use, and their types in the operator's API.
ENDPOINT_FIELDS = {"port": str, "interval": str, "scrapeTimeout": str, "relabelings": list}
METRICS_MODULES = ROOT / "scheduler_service"


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_built_in_object_fits_its_schema(overlay: str, version: str, tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(rendered(overlay))
    command = [tool("kubernetes-validate"), "--strict", "-k", version, str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    unknown = re.findall(r"find schema for kind (\w+)", output)
    assert set(unknown) <= {"PodMonitor"}
    assert output.count(" passed for resource ") == len(objects(overlay)) - len(unknown)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pod_monitor_finds_ports_that_the_pods_have(overlay: str) -> None:
    monitor = objects(overlay)["PodMonitor", "nanovllm"]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["spec"].keys() == {"selector", "podMetricsEndpoints"}
    labels = objects(overlay)["StatefulSet", "nanovllm"]["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    ports = {
        p["name"]: p["containerPort"] for c in containers(overlay).values() for p in c["ports"]
    }
    jobs = {}
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        assert all(isinstance(value, ENDPOINT_FIELDS[name]) for name, value in endpoint.items())
        (relabeling,) = endpoint["relabelings"]
        assert relabeling["targetLabel"] == "job"
        jobs[relabeling["replacement"]] = ports[endpoint["port"]]
    # The dashboards and alerts name the jobs.
    assert jobs == {
        f"nanovllm-{service}": default(service, "metrics_port")
        for service in ("scheduler", "executor")
    }


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("container", ["scheduler", "executor"])
def test_every_variable_is_a_setting_with_a_value_that_it_takes(
    overlay: str, container: str
) -> None:
    given = environment(overlay, container)
    assert {name for name in given if VARIABLE.fullmatch(name)} <= real_variables()
    assert settings_of(container, given)["model"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_services_meet_at_a_socket_and_nowhere_else(overlay: str) -> None:
    executor = settings_of("executor", environment(overlay, "executor"))
    scheduler = settings_of("scheduler", environment(overlay, "scheduler"))
    assert str(executor["listen"]).startswith("unix:/")
    assert scheduler["executor"] == executor["listen"]
    assert scheduler["model"] == executor["model"]
    folder = str(Path(str(executor["listen"]).removeprefix("unix:")).parent)
    for container in containers(overlay).values():
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts[folder] == "run"
    numbers = {p["containerPort"] for p in containers(overlay)["executor"]["ports"]}
    assert numbers == {default("executor", "metrics_port")}
    # Neither needs an exception from what protects a socket.
    assert "insecure" not in executor


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_ports_are_those_of_the_settings(overlay: str) -> None:
    scheduler = settings_of("scheduler", environment(overlay, "scheduler"))
    named = {p["name"]: p["containerPort"] for p in containers(overlay)["scheduler"]["ports"]}
    expected = {"grpc": port(scheduler["listen"])}
    assert named == expected | {"sched-metrics": default("scheduler", "metrics_port")}
    for name in ("nanovllm", "nanovllm-pods"):
        (service_port,) = objects(overlay)["Service", name]["spec"]["ports"]
        assert service_port["targetPort"] in named
    policy = objects(overlay)["NetworkPolicy", "nanovllm"]["spec"]
    allowed = [{p["port"] for p in rule["ports"]} for rule in policy["ingress"]]
    metrics = {default(service, "metrics_port") for service in ("scheduler", "executor")}
    assert allowed == [{named["grpc"]}, metrics]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_executor_outlives_the_scheduler_and_is_restarted_alone(overlay: str) -> None:
    (executor,) = pod(overlay)["initContainers"]
    assert executor["restartPolicy"] == "Always"
    # The scheduler starts behind it.
    assert executor["startupProbe"]["exec"]["command"] == [
        *("nanovllm", "health", "--address"),
        environment(overlay, "executor")["NANOVLLM_EXECUTOR_LISTEN"],
    ]
    assert "livenessProbe" in executor
    assert "preStop" in containers(overlay)["scheduler"]["lifecycle"]
    drain_s = default("scheduler", "drain_timeout_s")
    # Five for the endpoints, and the executor's last iteration.
    assert pod(overlay)["terminationGracePeriodSeconds"] >= drain_s + 5 + 25


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_a_lost_executor_makes_the_scheduler_unready_and_not_dead(overlay: str) -> None:
    scheduler = containers(overlay)["scheduler"]
    (grpc_port,) = {p["containerPort"] for p in scheduler["ports"] if p["name"] == "grpc"}
    assert scheduler["readinessProbe"]["grpc"] == {"port": grpc_port}
    for probe in ("livenessProbe", "startupProbe"):
        assert scheduler[probe]["grpc"] == {"port": grpc_port, "service": LIVENESS_SERVICE}


def test_with_tls_the_probes_speak_it_too() -> None:
    scheduler = containers("tls")["scheduler"]
    for probe in ("livenessProbe", "startupProbe", "readinessProbe"):
        # kubelet's gRPC probe knows no TLS.
        assert scheduler[probe].keys() >= {"exec"}
        assert "grpc" not in scheduler[probe]
        command = scheduler[probe]["exec"]["command"]
        assert command[:2] == ["nanovllm", "health"]
        assert (LIVENESS_SERVICE in command) == (probe != "readinessProbe")
    settings = settings_of("scheduler", environment("tls", "scheduler"))
    assert not settings["insecure"]
    folders = {mount["mountPath"] for mount in scheduler["volumeMounts"]}
    for name in ("tls_cert", "tls_key"):
        assert str(Path(str(settings[name])).parent) in folders


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_pod_meets_the_restricted_standard(overlay: str) -> None:
    spec = pod(overlay)
    assert spec["automountServiceAccountToken"] is False
    assert objects(overlay)["ServiceAccount", "nanovllm"]["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    dockerfile = (ROOT / "deploy/docker/scheduler.Dockerfile").read_text("utf-8")
    assert f"USER {spec['securityContext']['runAsUser']}:" in dockerfile
    kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
    assert kinds <= {"emptyDir", "secret"}
    for name, container in containers(overlay).items():
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]


def test_one_gpu_is_asked_for_by_the_executor_alone() -> None:
    asking = {
        (overlay, name)
        for overlay in OVERLAYS
        for name, container in containers(overlay).items()
        if container["resources"]["limits"].get("nvidia.com/gpu") == "1"
    }
    assert asking == {(overlay, "executor") for overlay in ("gpu", "tls", "gateway")}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_caches_of_the_images_are_on_the_claimed_volume(overlay: str) -> None:
    stateful = objects(overlay)["StatefulSet", "nanovllm"]["spec"]
    (claim,) = stateful["volumeClaimTemplates"]
    for container in containers(overlay).values():
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts[claim["metadata"]["name"]] == "/var/cache/nanovllm"
        assert mounts["tmp"] == "/tmp"


@pytest.mark.parametrize(("overlay", "profile"), [("cpu", "cpu"), ("gpu", "gpu")])
def test_the_images_are_those_of_compose_and_of_this_version(overlay: str, profile: str) -> None:
    composed = {service["image"] for service in configuration(profile)["services"].values()}
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    for container in containers(overlay).values():
        assert container["image"] in composed
        assert container["image"].endswith(f":{version}")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_autoscaler_looks_at_a_metric_of_the_scheduler_that_the_adapter_serves(
    overlay: str,
) -> None:
    scaler = objects(overlay)["HorizontalPodAutoscaler", "nanovllm"]["spec"]
    assert scaler["scaleTargetRef"] == {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "name": "nanovllm",
    }
    # It alone owns the number of pods; one in the manifest would undo its work at every apply.
    assert "replicas" not in objects(overlay)["StatefulSet", "nanovllm"]["spec"]
    (metric,) = scaler["metrics"]
    name = metric["pods"]["metric"]["name"]
    text = (FOLDER / "components/monitoring/prometheus-adapter-rule.yaml").read_text("utf-8")
    (rule,) = yaml.safe_load(text)["rules"]["custom"]
    assert rule["name"]["as"] == name
    assert rule["seriesQuery"].startswith(name + "{")
    sources = "".join(path.read_text("utf-8") for path in METRICS_MODULES.rglob("*metrics*.py"))
    assert f'"{name}"' in sources or f'"{name.removeprefix("nanovllm_")}"' in sources


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_selectors_select_the_pods(overlay: str) -> None:
    everything = objects(overlay)
    labels = everything["StatefulSet", "nanovllm"]["spec"]["template"]["metadata"]["labels"]
    assert everything["StatefulSet", "nanovllm"]["spec"]["serviceName"] == "nanovllm-pods"
    selectors = [
        everything["Service", "nanovllm"]["spec"]["selector"],
        everything["Service", "nanovllm-pods"]["spec"]["selector"],
        everything["PodDisruptionBudget", "nanovllm"]["spec"]["selector"]["matchLabels"],
        everything["NetworkPolicy", "nanovllm"]["spec"]["podSelector"]["matchLabels"],
        everything["StatefulSet", "nanovllm"]["spec"]["selector"]["matchLabels"],
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()
