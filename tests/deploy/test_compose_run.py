"""The images and docker-compose.yml on a real Docker engine, without a GPU and without Grafana.

Takes minutes and gigabytes, so it runs only on request:

    NANOVLLM_TEST_DOCKER=1 python -m pytest tests/deploy/test_compose_run.py

$DOCKER names a client that can use BuildKit, $DOCKER_HOST the engine; $TORCH_INDEX is an argument
of the executor's image. Base images that cannot be pulled have to be there under their names.
"""

import json
import os
import socket
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from nanovllm import Client, Health, SamplingParams
from nanovllm.outputs import FinishReason
from nanovllm.tls import TlsConfig
from tests.deploy.compose import PASSWORD, ROOT, command, run
from tests.e2e.support import wait_until, wait_until_serving

OPT_IN = "NANOVLLM_TEST_DOCKER"
DOCKER = os.environ.get("DOCKER", "docker")
PLAIN, TLS = "docker-compose.yml", "deploy/docker/compose.tls.yml"
BUILD_LIMIT_S = 1800.0
# The first start fetches the model.
START_LIMIT_S = 600.0
LIMIT_S = 600.0
#: Ends the executor from within, as a crash does: after `docker kill` Docker would not restart it.
CRASH = """
import os, pathlib, signal
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    # The first process is the init that Docker puts in front.
    if int(folder.name) not in (1, os.getpid()):
        if b"executor_service" in (folder / "cmdline").read_bytes():
            os.kill(int(folder.name), signal.SIGKILL)
"""
#: In bfloat16 a prompt computed anew may take another path at a tie. The times are for slow
#: machines.
SETTINGS = f"""\
NANOVLLM_EXECUTOR_DTYPE=float32
NANOVLLM_EXECUTOR_MAX_MODEL_LEN=512
NANOVLLM_SCHEDULER_EXECUTOR_WAIT_TIMEOUT_S={LIMIT_S}
NANOVLLM_SCHEDULER_DRAIN_TIMEOUT_S={LIMIT_S}
"""
PROMPT = "A long story about a lighthouse keeper:"
#: Long enough that the executor's death comes in the middle.
LONG = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(BUILD_LIMIT_S + 2 * START_LIMIT_S),
    pytest.mark.skipif(OPT_IN not in os.environ, reason=f"runs containers; set {OPT_IN}=1"),
]


@dataclass(frozen=True, slots=True)
class Stack:
    """A running Compose project."""

    project: str
    environment: Mapping[str, str]
    files: tuple[str, ...]
    address: str
    prometheus: str

    def compose(self, *arguments: str, limit_s: float = LIMIT_S) -> str:
        """Runs Compose on this project; fails the test if it fails."""
        result = run(
            ["--project-name", self.project, "--profile", "cpu", *arguments],
            self.environment,
            files=self.files,
            timeout_s=limit_s,
        )
        if result.returncode != 0:
            pytest.fail(f"compose {arguments[0]}: {result.stderr}\n{self.logs()}")
        return result.stdout

    def logs(self) -> str:
        project = ["--project-name", self.project, "--profile", "cpu"]
        return run([*project, "logs", "--tail", "50"], self.environment, files=self.files).stdout

    def inside(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in a container."""
        container = self.compose("ps", "--all", "--quiet", service).strip()
        return docker("exec", container, *command, check=False)

    def state(self, service: str) -> dict[str, object]:
        """What the engine says about a container's process."""
        container = self.compose("ps", "--all", "--quiet", service).strip()
        state: dict[str, object] = json.loads(docker("inspect", container).stdout)[0]["State"]
        return state


def docker(
    *arguments: str, check: bool = True, limit_s: float = LIMIT_S
) -> subprocess.CompletedProcess[str]:
    result = subprocess.run(
        [DOCKER, *arguments],
        cwd=ROOT,
        env={**os.environ, "DOCKER_BUILDKIT": "1"},
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    if check and result.returncode != 0:
        pytest.fail(f"docker {arguments[0]}: {result.stderr[-4000:]}")
    return result


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def images() -> None:
    """The images under the names that docker-compose.yml gives them."""
    try:
        answered = docker("info", check=False).returncode == 0
    except OSError:
        answered = False
    if not answered:
        pytest.skip("no Docker engine answers")
    index = os.environ.get("TORCH_INDEX", "")
    scheduler = ("--file", "deploy/docker/scheduler.Dockerfile")
    executor = ("--file", "deploy/docker/executor.Dockerfile", "--target", "cpu")
    docker("build", *scheduler, "--tag", "nanovllm-scheduler:0.1.0", ".", limit_s=BUILD_LIMIT_S)
    docker(
        *("build", *executor, "--build-arg", f"TORCH_INDEX={index}"),
        *("--tag", "nanovllm-executor-cpu:0.1.0", "."),
        limit_s=BUILD_LIMIT_S,
    )


@pytest.fixture(scope="module")
def models(images: None) -> Iterator[str]:
    """A volume for the model that all stacks share, so that it is fetched once."""
    name = f"nanovllm-test-{uuid.uuid4().hex[:8]}"
    docker("volume", "create", name)
    yield name
    docker("volume", "rm", "--force", name)


@contextmanager
def running(folder: Path, models: str, *, files: tuple[str, ...] = (PLAIN,)) -> Iterator[Stack]:
    """Starts the CPU profile; takes everything away again."""
    settings = folder / "settings.env"
    settings.write_text(SETTINGS)
    shared = folder / "models.yml"
    shared.write_text(f"volumes:\n  models:\n    external: true\n    name: {models}\n")
    api, prometheus = free_port(), free_port()
    environment = {
        **PASSWORD,
        "SCHEDULER_PORT": str(api),
        "PROMETHEUS_PORT": str(prometheus),
        "SETTINGS_FILE": str(settings),
        "TLS_DIR": str(folder / "tls"),
    }
    stack = Stack(
        f"nanovllm-test-{uuid.uuid4().hex[:8]}",
        environment,
        (*files, str(shared)),
        f"127.0.0.1:{api}",
        f"http://127.0.0.1:{prometheus}",
    )
    try:
        services = ("executor-cpu", "scheduler", "prometheus")
        stack.compose("up", "--no-build", "--detach", "--wait", *services, limit_s=START_LIMIT_S)
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "60")


@pytest.fixture(scope="module")
def stack(models: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(tmp_path_factory.mktemp("plain"), models) as stack:
        yield stack


@pytest.fixture
def client(stack: Stack) -> Iterator[Client]:
    with Client(stack.address, timeout_s=LIMIT_S) as client:
        wait_until_serving(client)
        yield client


def test_the_schedulers_image_has_no_torch(images: None) -> None:
    program = "import importlib.util as u; print(u.find_spec('torch'), u.find_spec('jinja2'))"
    run_python = ("run", "--rm", "--network", "none", "--entrypoint", "python")
    found = docker(*run_python, "nanovllm-scheduler:0.1.0", "-c", program).stdout
    assert found.startswith("None ModuleSpec")


def test_everything_is_healthy_when_compose_says_so(stack: Stack, client: Client) -> None:
    for service in ("executor-cpu", "scheduler", "prometheus"):
        health = stack.state(service)["Health"]
        assert isinstance(health, dict)
        assert health["Status"] == "healthy"
    assert client.health() is Health.SERVING
    assert client.server_status().executor_connected


def test_a_chat_is_answered_through_the_published_port(client: Client) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    output = client.generate(messages, SamplingParams(temperature=0.0, max_tokens=32))
    assert "Paris" in output.text


def test_the_containers_cannot_write_to_their_images_and_are_not_root(stack: Stack) -> None:
    for service in ("executor-cpu", "scheduler"):
        refused = stack.inside(service, "touch", "/opt/nanovllm/new")
        assert "Read-only file system" in refused.stderr
        assert stack.inside(service, "id", "-u").stdout.strip() == "10001"
        assert stack.inside(service, "touch", "/tmp/new").returncode == 0


def test_prometheus_scrapes_both_services(stack: Stack) -> None:
    def healthy() -> set[str]:
        with urllib.request.urlopen(f"{stack.prometheus}/api/v1/targets", timeout=10) as answer:
            targets = json.load(answer)["data"]["activeTargets"]
        return {target["labels"]["job"] for target in targets if target["health"] == "up"}

    jobs = {"nanovllm-scheduler", "nanovllm-executor"}
    wait_until(lambda: healthy() == jobs, "both targets are up", LIMIT_S)


def test_a_request_outlives_its_executor_which_is_started_again(
    stack: Stack, client: Client
) -> None:
    undisturbed = client.generate(PROMPT, LONG).token_ids
    assert len(undisturbed) == LONG.max_tokens
    epoch = client.server_status().executor.epoch  # type: ignore[union-attr]

    token_ids: list[int] = []
    with client.stream(PROMPT, LONG, timeout_s=LIMIT_S) as deltas:
        for delta in deltas:
            if not token_ids:
                stack.inside("executor-cpu", "python", "-c", CRASH)
                wait_until(lambda: client.health() is Health.NOT_SERVING, "the loss shows", LIMIT_S)
            token_ids += delta.token_ids
    assert delta.finish_reason is FinishReason.LENGTH
    assert token_ids == undisturbed
    assert client.server_status().executor.epoch != epoch  # type: ignore[union-attr]
    assert client.health() is Health.SERVING


def stop_in_background(stack: Stack, service: str) -> subprocess.Popen[bytes]:
    words, environment = command(
        ["--project-name", stack.project, "stop", "--timeout", f"{LIMIT_S:.0f}", service],
        stack.environment,
        files=stack.files,
    )
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def test_stopping_lets_a_running_request_end(stack: Stack, client: Client) -> None:
    received = 0
    with client.stream(PROMPT, LONG, timeout_s=LIMIT_S) as deltas:
        for delta in deltas:
            if not received:
                # Returns when the scheduler has gone, so in a process of its own.
                stopping = stop_in_background(stack, "scheduler")
            received += len(delta.token_ids)
    assert received == LONG.max_tokens
    assert stopping.wait(LIMIT_S) == 0
    assert stack.state("scheduler")["ExitCode"] == 0
    stack.compose("stop", "executor-cpu")
    assert stack.state("executor-cpu")["ExitCode"] == 0


def test_with_tls_the_services_authenticate_each_other_and_serve(
    models: str, tmp_path: Path
) -> None:
    authority = trustme.CA()
    tls = tmp_path / "tls"
    for name, hosts in (("executor", ["executor"]), ("scheduler", ["scheduler", "localhost"])):
        folder = tls / name
        folder.mkdir(parents=True)
        certificate = authority.issue_cert(*hosts)
        certificate.cert_chain_pems[0].write_to_path(folder / "cert.pem")
        certificate.private_key_pem.write_to_path(folder / "key.pem")
        authority.cert_pem.write_to_path(folder / "ca.pem")
        for path in folder.iterdir():
            path.chmod(0o644)
    trust = TlsConfig(ca=tls / "scheduler/ca.pem", server_name="localhost")
    with (
        running(tmp_path, models, files=(PLAIN, TLS)) as stack,
        Client(stack.address, tls=trust, timeout_s=LIMIT_S) as client,
    ):
        wait_until_serving(client)
        output = client.generate("The sea is", SamplingParams(max_tokens=4, ignore_eos=True))
        assert len(output.token_ids) == 4
