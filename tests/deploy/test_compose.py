"""docker-compose.yml and .env.example, as Docker Compose reads them; no Docker engine is needed."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.compose import (
    INTERPOLATED,
    PASSWORD,
    ROOT,
    TLS_FILE,
    TWO_EXECUTORS_FILE,
    configuration,
    run,
)
from tests.deploy.variables import (
    VARIABLE,
    default,
    port,
    real_variables,
    setting_variables,
    settings_of,
)

EXECUTORS = {"gpu": "executor", "cpu": "executor-cpu"}
OURS = ("scheduler", "executor", "executor-cpu")


@pytest.fixture(scope="module")
def gpu() -> dict[str, Any]:
    return configuration("gpu")


@pytest.fixture(scope="module")
def cpu() -> dict[str, Any]:
    return configuration("cpu")


@pytest.fixture(scope="module", params=["gpu", "cpu"])
def stack(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A profile's executor and its configuration."""
    return EXECUTORS[request.param], request.getfixturevalue(request.param)


def seconds(duration: str) -> int:
    minutes, rest = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration).groups()  # type: ignore[union-attr]
    return 60 * int(minutes or 0) + int(rest or 0)


def started(*arguments: str, environment: dict[str, str]) -> set[str]:
    result = run([*arguments, "config", "--services"], PASSWORD | environment)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split())


def scrape_targets() -> set[str]:
    text = (ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8")
    jobs = yaml.safe_load(text)["scrape_configs"]
    return {t for job in jobs for static in job["static_configs"] for t in static["targets"]}


def test_each_profile_starts_one_kind_of_executor() -> None:
    others = {"scheduler", "prometheus", "grafana"}
    assert started(environment={"COMPOSE_PROFILES": "gpu"}) == {"executor", *others}
    assert started("--profile", "cpu", environment={}) == {"executor-cpu", *others}


def test_the_profile_of_the_command_line_replaces_that_of_the_environment() -> None:
    assert "executor" not in started("--profile", "cpu", environment={"COMPOSE_PROFILES": "gpu"})


def test_without_a_password_for_grafana_the_error_says_what_to_do() -> None:
    result = run(["config", "--quiet"], {})
    assert result.returncode != 0
    assert "copy .env.example to .env" in result.stderr


def test_the_executor_is_reached_through_internal_networks_only(stack: Any) -> None:
    executor, document = stack
    service = document["services"][executor]
    assert "ports" not in service
    for name, network in document["networks"].items():
        members = {
            other
            for other, definition in document["services"].items()
            if name in definition["networks"] and other != executor
        }
        if name in service["networks"] and members:
            assert network.get("internal"), f"{members} reach the executor through {name}"
    engine = {
        other
        for other, definition in document["services"].items()
        if "engine" in definition["networks"]
    }
    assert engine == {executor, "scheduler"}


def test_both_kinds_of_executor_answer_to_the_name_that_the_others_use(stack: Any) -> None:
    executor, document = stack
    targets = {target.partition(":")[0] for target in scrape_targets()}
    assert targets == {"executor", "scheduler"}
    networks = document["services"][executor]["networks"]
    for name in ("engine", "metrics"):
        assert executor == "executor" or "executor" in networks[name]["aliases"]
        assert name in document["services"]["scheduler"]["networks"]


def test_ports_are_published_on_loopback_unless_told_otherwise(gpu: dict[str, Any]) -> None:
    published = [port for s in gpu["services"].values() for port in s.get("ports", [])]
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}
    elsewhere = configuration("gpu", {**PASSWORD, "PUBLISH_ADDRESS": "10.0.0.5"})
    (api,) = elsewhere["services"]["scheduler"]["ports"]
    assert (api["host_ip"], api["target"]) == ("10.0.0.5", 50051)


def test_the_addresses_of_the_services_fit_together(stack: Any) -> None:
    executor, document = stack
    served = settings_of("executor", document["services"][executor]["environment"])
    steering = settings_of("scheduler", document["services"]["scheduler"]["environment"])
    assert steering["executor"] == f"executor:{port(served['listen'])}"
    assert steering["model"] == served["model"]
    (published,) = document["services"]["scheduler"]["ports"]
    assert published["target"] == port(steering["listen"])


def test_prometheus_scrapes_the_ports_of_the_metrics() -> None:
    services = ("executor", "scheduler")
    expected = {f"{service}:{default(service, 'metrics_port')}" for service in services}
    assert scrape_targets() == expected


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_every_variable_of_the_services_is_a_setting_with_a_value_that_it_takes(
    profile: str, tls: bool
) -> None:
    services = configuration(profile, tls=tls)["services"]
    for name in ("scheduler", EXECUTORS[profile]):
        kind = name.partition("-")[0]
        environment = services[name]["environment"]
        ours = {variable for variable in environment if VARIABLE.fullmatch(variable)}
        prefix = f"NANOVLLM_{kind.upper()}_"
        assert {v for v in ours if v.startswith(prefix)} <= setting_variables(kind).keys()
        assert ours <= real_variables()
        assert settings_of(kind, environment)


def test_every_variable_in_the_examples_is_real() -> None:
    for path in (".env.example", TLS_FILE, TWO_EXECUTORS_FILE, "docker-compose.yml"):
        named = set(VARIABLE.findall((ROOT / path).read_text("utf-8")))
        # A prefix in a sentence, such as NANOVLLM_EXECUTOR_*, is none.
        assert {name for name in named if not name.endswith("_")} <= real_variables(), path


def test_with_tls_neither_service_is_insecure() -> None:
    services = configuration("cpu", tls=True)["services"]
    executor = settings_of("executor", services["executor-cpu"]["environment"])
    scheduler = settings_of("scheduler", services["scheduler"]["environment"])
    assert not executor["insecure"]
    assert not scheduler["insecure"]
    assert executor["tls_client_ca"] is not None
    assert scheduler["executor_tls_cert"] is not None
    for name in ("executor-cpu", "scheduler"):
        folders = [v["target"] for v in services[name]["volumes"] if v["type"] == "bind"]
        files = [
            value
            for variable, value in services[name]["environment"].items()
            if variable.endswith(("_CERT", "_KEY", "_CA"))
        ]
        assert {str(Path(file).parent) for file in files} == set(folders)


def test_every_container_is_confined(stack: Any) -> None:
    _, document = stack
    for name, service in document["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert int(service["deploy"]["resources"]["limits"]["memory"]) > 0, name
        assert service["restart"] == "unless-stopped", name


def test_services_have_the_time_to_stop_that_their_settings_allow(stack: Any) -> None:
    executor, document = stack
    services = document["services"]
    stop_s = default("scheduler", "drain_timeout_s") + 5
    assert seconds(services["scheduler"]["stop_grace_period"]) >= stop_s
    assert seconds(services[executor]["stop_grace_period"]) >= 35


def test_the_scheduler_starts_when_the_executor_is_healthy(stack: Any) -> None:
    executor, document = stack
    dependencies = document["services"]["scheduler"]["depends_on"]
    assert dependencies[executor]["condition"] == "service_healthy"
    # The other one is not started, and not needed.
    assert all(dependency["required"] is False for dependency in dependencies.values())


def test_only_the_gpu_profile_asks_for_a_gpu(gpu: dict[str, Any], cpu: dict[str, Any]) -> None:
    def devices(document: dict[str, Any], name: str) -> list[dict[str, Any]]:
        resources = document["services"][name]["deploy"]["resources"]
        return resources.get("reservations", {}).get("devices", [])

    (device,) = devices(gpu, "executor")
    assert device["capabilities"] == ["gpu"]
    assert device["device_ids"] == ["0"]
    assert devices(cpu, "executor-cpu") == []


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_a_second_executor_is_like_the_first_but_for_its_name_and_its_device(profile: str) -> None:
    services = configuration(profile, two_executors=True)["services"]
    scheduler = settings_of("scheduler", services["scheduler"]["environment"])
    assert scheduler["executor"] == "executor:50052,executor-2:50052"
    first, second = services[EXECUTORS[profile]], services[f"{EXECUTORS[profile]}-2"]
    for name in ("engine", "metrics"):
        assert second["networks"][name]["aliases"] == ["executor-2"]
        assert name in services["scheduler"]["networks"]
    assert second["networks"].keys() == first["networks"].keys()
    assert port(settings_of("executor", second["environment"])["listen"]) == 50052
    assert second["depends_on"][EXECUTORS[profile]]["condition"] == "service_healthy"
    if profile == "gpu":
        (device,) = second["deploy"]["resources"]["reservations"]["devices"]
        assert device["device_ids"] == ["1"]
    for executor in (first, second):
        executor["deploy"]["resources"].pop("reservations", None)
        executor.pop("networks")
        executor.pop("depends_on", None)
    assert second == first


def test_images_carry_the_version_of_the_package(stack: Any) -> None:
    _, document = stack
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    tags = {
        name: service["image"].rpartition(":")[2] for name, service in document["services"].items()
    }
    for name, tag in tags.items():
        assert tag == version if name in OURS else re.fullmatch(r"v?\d+\.\d+\.\d+", tag), name


def test_what_is_mounted_from_the_repository_exists(stack: Any) -> None:
    _, document = stack
    mounts = [v for s in document["services"].values() for v in s.get("volumes", [])]
    binds = [mount for mount in mounts if mount["type"] == "bind"]
    assert len(binds) >= 4
    for mount in binds:
        assert Path(mount["source"]).exists(), mount["source"]
        assert mount["read_only"]


def test_grafana_finds_its_dashboards_and_its_data_source(gpu: dict[str, Any]) -> None:
    folder = ROOT / "deploy/grafana/provisioning"
    (dashboards,) = (folder / "dashboards").glob("*.yml")
    (sources,) = (folder / "datasources").glob("*.yml")
    mounts = {v["target"]: v["source"] for v in gpu["services"]["grafana"]["volumes"]}
    (provider,) = yaml.safe_load(dashboards.read_text("utf-8"))["providers"]
    assert Path(mounts[provider["options"]["path"]]) == ROOT / "deploy/grafana/dashboards"
    assert Path(mounts["/etc/grafana/provisioning"]) == folder
    (source,) = yaml.safe_load(sources.read_text("utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "metrics" in gpu["services"]["grafana"]["networks"]
    assert gpu["services"]["grafana"]["environment"]["GF_AUTH_ANONYMOUS_ENABLED"] == "false"


def test_the_example_of_env_names_every_variable_with_its_default() -> None:
    files = ("docker-compose.yml", TLS_FILE, TWO_EXECUTORS_FILE)
    text = "".join((ROOT / file).read_text("utf-8") for file in files)
    # The memory of the executor has two defaults, one for each kind.
    defaults: dict[str, set[str]] = {}
    for name, value in re.findall(r"\$\{(\w+)(?::-([^}]*)|:\?[^}]*)?\}", text):
        defaults.setdefault(name, set()).add(value)
    example = (ROOT / ".env.example").read_text("utf-8")
    shown = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", example, re.MULTILINE))
    assert defaults.keys() | {"COMPOSE_PROFILES", "COMPOSE_FILE", "HF_TOKEN"} == shown.keys()
    assert shown.keys() == set(INTERPOLATED)
    for name, values in defaults.items():
        assert shown[name] in values, name


def test_a_file_of_settings_reaches_the_services_and_not_grafana(tmp_path: Path) -> None:
    settings = tmp_path / "settings.env"
    settings.write_text("NANOVLLM_EXECUTOR_MAX_MODEL_LEN=512\nNANOVLLM_EXECUTOR_LISTEN=evil:1\n")
    services = configuration("cpu", {**PASSWORD, "SETTINGS_FILE": str(settings)})["services"]
    environment = services["executor-cpu"]["environment"]
    assert environment["NANOVLLM_EXECUTOR_MAX_MODEL_LEN"] == "512"
    assert environment["NANOVLLM_EXECUTOR_LISTEN"] == "0.0.0.0:50052"
    assert not any(VARIABLE.match(name) for name in services["grafana"]["environment"])
    passwords = [name for name, s in services.items() if "secret" in str(s.get("environment"))]
    assert passwords == ["grafana"]
