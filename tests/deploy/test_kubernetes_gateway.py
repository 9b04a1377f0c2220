"""The overlay with several replicas behind smg: manifests against each other and against smg."""

from argparse import ArgumentParser
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pytest

from examples.smg import ARGUMENTS
from tests.deploy.compose import configuration
from tests.deploy.manifests import environment, objects
from tests.deploy.variables import port, settings_of
from tests.gateway.replicas import skip_without_smg

GATEWAY = "nanovllm-gateway"


def gateway(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = objects("gateway")[kind, GATEWAY]
    return found


def spec(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = gateway(kind)["spec"]
    return found


def pod() -> dict[str, Any]:
    found: dict[str, Any] = spec("Deployment")["template"]["spec"]
    return found


def container() -> dict[str, Any]:
    (found,) = pod()["containers"]
    assert isinstance(found, dict)
    return found


def options() -> dict[str, str]:
    """smg's options and their values."""
    words = container()["args"]
    assert words[0] == "launch"
    return dict(word.partition("=")[::2] for word in words[1:])


def ports() -> dict[str, int]:
    return {p["name"]: p["containerPort"] for p in container()["ports"]}


def replica_labels() -> dict[str, str]:
    template = objects("gateway")["StatefulSet", "nanovllm"]["spec"]["template"]
    labels: dict[str, str] = template["metadata"]["labels"]
    return labels


def replica_port() -> int:
    settings = settings_of("scheduler", environment("gateway", "scheduler"))
    return port(settings["listen"])


def test_every_option_is_one_that_this_version_of_smg_takes() -> None:
    skip_without_smg()
    parser = ArgumentParser(allow_abbrev=False)
    import_module("smg.router_args").RouterArgs.add_cli_args(parser, use_router_prefix=False)
    _, unknown = parser.parse_known_args(container()["args"][1:])
    assert unknown == []
    assert container()["image"].endswith(f":{version('smg')}")
    assert container()["image"] == configuration("gateway")["services"]["gateway"]["image"]


def test_smg_balances_and_checks_health_as_in_the_example() -> None:
    given = options()
    # A process on a laptop ends at once; a pod has time.
    skipped = {"--shutdown-grace-period-secs"}
    position = 0
    while position < len(ARGUMENTS):
        name = ARGUMENTS[position]
        has_value = position + 1 < len(ARGUMENTS) and not ARGUMENTS[position + 1].startswith("--")
        if name not in skipped:
            assert given[name] == (ARGUMENTS[position + 1] if has_value else ""), name
        position += 2 if has_value else 1


def test_smg_looks_for_the_replicas_in_its_namespace_at_their_port() -> None:
    given = options()
    key, _, value = given["--selector"].partition("=")
    assert replica_labels()[key] == value
    assert int(given["--service-discovery-port"]) == replica_port()
    (namespace,) = (entry for entry in container()["env"] if entry["name"] == "NAMESPACE")
    assert given["--service-discovery-namespace"] == "$(NAMESPACE)"
    assert namespace["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.namespace"
    # smg must not take itself for a replica.
    assert spec("Deployment")["template"]["metadata"]["labels"].get(key) != value


def test_smg_may_read_the_pods_of_its_namespace_and_nothing_else() -> None:
    assert gateway("Role")["rules"] == [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}
    ]
    binding = gateway("RoleBinding")
    assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) == ("Role", GATEWAY)
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": GATEWAY}]
    assert pod()["serviceAccountName"] == gateway("ServiceAccount")["metadata"]["name"]
    # Without its token smg could not ask the API server.
    assert pod().get("automountServiceAccountToken", True)
    assert gateway("ServiceAccount").get("automountServiceAccountToken", True)
    assert {kind for kind, _ in objects("gateway")} & {"ClusterRole", "ClusterRoleBinding"} == set()


def test_both_keys_come_from_a_secret_that_must_exist() -> None:
    given = options()
    secrets = {
        entry["name"]: entry["valueFrom"]["secretKeyRef"]
        for entry in container()["env"]
        if "secretKeyRef" in entry.get("valueFrom", {})
    }
    assert given["--api-key"] == "$(API_KEY)"
    assert given["--control-plane-api-keys"].endswith(":admin:$(CONTROL_PLANE_KEY)")
    assert secrets == {
        "API_KEY": {"name": GATEWAY, "key": "api-key"},
        "CONTROL_PLANE_KEY": {"name": GATEWAY, "key": "control-plane-key"},
    }
    assert ("Secret", GATEWAY) not in objects("gateway")


def test_services_probes_and_monitors_name_ports_that_smg_listens_on() -> None:
    given = options()
    assert ports() == {
        "http": int(given["--port"]),
        "probes": int(given["--health-check-port"]),
        "gw-metrics": int(given["--prometheus-port"]),
    }
    assert given["--host"] == given["--prometheus-host"] == "0.0.0.0"
    (service_port,) = spec("Service")["ports"]
    assert service_port["targetPort"] == "http"
    for probe, path in (
        ("startupProbe", "/liveness"),
        ("livenessProbe", "/liveness"),
        ("readinessProbe", "/readiness"),
    ):
        assert container()[probe]["httpGet"] == {"path": path, "port": "probes"}
    (endpoint,) = spec("PodMonitor")["podMetricsEndpoints"]
    assert ports()[endpoint["port"]] == int(given["--prometheus-port"])
    assert endpoint["relabelings"] == [{"targetLabel": "job", "replacement": GATEWAY}]


def test_selectors_select_the_pods_of_smg_and_not_those_of_the_replicas() -> None:
    labels = spec("Deployment")["template"]["metadata"]["labels"]
    spread = pod()["topologySpreadConstraints"]
    selectors = [
        spec("Deployment")["selector"]["matchLabels"],
        spec("Service")["selector"],
        spec("PodDisruptionBudget")["selector"]["matchLabels"],
        spec("NetworkPolicy")["podSelector"]["matchLabels"],
        spec("PodMonitor")["selector"]["matchLabels"],
        *(constraint["labelSelector"]["matchLabels"] for constraint in spread),
    ]
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()
        assert not selector.items() <= replica_labels().items()


def test_only_smg_reaches_the_replicas() -> None:
    policy = objects("gateway")["NetworkPolicy", "nanovllm"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= replica_labels().items()
    (rule,) = (r for r in policy["ingress"] if {"port": replica_port()} in r["ports"])
    (peer,) = rule["from"]
    assert peer.keys() == {"podSelector"}
    labels = spec("Deployment")["template"]["metadata"]["labels"]
    assert peer["podSelector"]["matchLabels"].items() <= labels.items()
    # The other overlays have no smg, and let the namespace in.
    plain = objects("gpu")["NetworkPolicy", "nanovllm"]["spec"]["ingress"][0]
    assert plain["from"] == [{"podSelector": {}}]


def test_smg_reaches_the_replicas_the_api_server_and_names() -> None:
    policy = spec("NetworkPolicy")
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    names, replicas, api_server = policy["egress"]
    assert {p["port"] for p in names["ports"]} == {53}
    (peer,) = replicas["to"]
    assert peer["podSelector"]["matchLabels"].items() <= replica_labels().items()
    assert replicas["ports"] == [{"port": replica_port()}]
    assert api_server == {"ports": [{"port": 443}, {"port": 6443}]}
    allowed = [{p["port"] for p in rule["ports"]} for rule in policy["ingress"]]
    assert allowed == [{ports()["http"]}, {ports()["gw-metrics"]}]


def test_a_gateway_that_ends_finishes_its_requests_before_it_is_killed() -> None:
    grace_s = int(options()["--shutdown-grace-period-secs"])
    (sleep, seconds) = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    assert pod()["terminationGracePeriodSeconds"] > grace_s + int(seconds)


@pytest.mark.parametrize("kind", ["StatefulSet", "Deployment"])
def test_one_node_or_one_eviction_never_takes_everything(kind: str) -> None:
    everything = objects("gateway")
    name = "nanovllm" if kind == "StatefulSet" else GATEWAY
    template = everything[kind, name]["spec"]["template"]
    (constraint,) = template["spec"]["topologySpreadConstraints"]
    assert constraint["topologyKey"] == "kubernetes.io/hostname"
    labels = template["metadata"]["labels"]
    assert constraint["labelSelector"]["matchLabels"].items() <= labels.items()
    assert everything["PodDisruptionBudget", name]["spec"]["maxUnavailable"] == 1
    if kind == "StatefulSet":
        scaler = everything["HorizontalPodAutoscaler", name]["spec"]
        assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
    else:
        assert everything[kind, name]["spec"]["replicas"] >= 2


def test_the_pod_of_smg_meets_the_restricted_standard() -> None:
    assert pod()["securityContext"]["runAsNonRoot"] is True
    assert pod()["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {kind for volume in pod()["volumes"] for kind in volume if kind != "name"} == {
        "emptyDir"
    }
    assert container()["resources"]["requests"].keys() >= {"cpu", "memory"}
    assert "memory" in container()["resources"]["limits"]
