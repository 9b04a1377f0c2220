"""The profile "gateway" of docker-compose.yml, as Docker Compose reads it."""

from importlib.metadata import version

from examples.smg import ARGUMENTS
from tests.deploy.compose import configuration
from tests.gateway.replicas import skip_without_smg


def test_the_gateway_starts_with_its_profile_alone() -> None:
    assert "gateway" not in configuration("cpu")["services"]
    assert "gateway" in configuration("gateway")["services"]


def test_the_gateway_reaches_the_scheduler_and_is_published_on_loopback_only() -> None:
    services = configuration("gateway")["services"]
    gateway, scheduler = services["gateway"], services["scheduler"]
    (port,) = scheduler["ports"]
    assert f"--worker-urls=grpc://scheduler:{port['target']}" in gateway["command"]
    assert set(gateway["networks"]) <= set(scheduler["networks"])
    (published,) = gateway["ports"]
    assert published["host_ip"] == "127.0.0.1"
    assert f"--port={published['target']}" in gateway["command"]


def test_the_gateway_is_the_version_that_the_tests_run_with_the_options_of_the_example() -> None:
    skip_without_smg()
    gateway = configuration("gateway")["services"]["gateway"]
    assert gateway["image"].endswith(f":{version('smg')}")
    assert f"smg=={version('smg')}" in gateway["build"]["dockerfile_inline"]
    options = dict(option.partition("=")[::2] for option in gateway["command"])
    ours = {"launch", "--host", "--port", "--worker-urls"}
    for name, value in options.items():
        if name not in ours:
            assert name in ARGUMENTS, name
            assert not value or ARGUMENTS[ARGUMENTS.index(name) + 1] == value, name
