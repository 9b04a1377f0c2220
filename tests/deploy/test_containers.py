"""The Dockerfiles, what they copy, and the package that they install."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.variables import VARIABLE, default, port, real_variables

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "deploy/docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
FIRST_PARTY = ("nanovllm", "nanovllm_core", "scheduler_service", "executor_service")


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions of a Dockerfile with their arguments, continued lines joined."""
    lines = [
        line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(keyword, rest.strip()) for keyword, _, rest in pairs]


def final_stages(path: Path) -> dict[str, list[tuple[str, str]]]:
    """The stages that start a program, by what they are called."""
    stages: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for keyword, rest in instructions(path):
        if keyword == "FROM":
            name = rest.partition(" AS ")[2] or "scheduler"
            stages[name] = []
        elif stages:
            stages[name].append((keyword, rest))
    return {name: stage for name, stage in stages.items() if "ENTRYPOINT" in dict(stage)}


STAGES = {name: stage for path in DOCKERFILES for name, stage in final_stages(path).items()}


def test_there_are_three_images() -> None:
    assert STAGES.keys() == {"scheduler", "cpu", "gpu"}


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint is not installed; it comes with the extra dev")
    command = [hadolint, "--config", *map(str, [DOCKER / "hadolint.yaml", *DOCKERFILES])]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_every_base_image_is_a_pinned_argument(path: Path) -> None:
    defaults = dict(
        rest.partition("=")[::2] for keyword, rest in instructions(path) if keyword == "ARG"
    )
    for keyword, rest in instructions(path):
        if keyword == "FROM" and (argument := re.match(r"\$\{(\w+)\}", rest)):
            tag = defaults[argument[1]].partition(":")[2]
            assert re.match(r"\d+\.\d+\.\d+-", tag), f"{argument[1]} names no exact version"
    # An image for the syntax would have to be pulled before anything is built.
    assert "# syntax=" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("stage", STAGES)
def test_an_image_runs_unprivileged_and_gets_its_signals(stage: str) -> None:
    last = dict(STAGES[stage])
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last["USER"])
    module = "scheduler_service" if stage == "scheduler" else "executor_service"
    # Not through a shell, which would keep SIGTERM to itself.
    assert json.loads(last["ENTRYPOINT"]) == ["python", "-m", module]
    assert last["STOPSIGNAL"] == "SIGTERM"


@pytest.mark.parametrize("stage", STAGES)
def test_the_health_check_asks_the_port_that_the_image_exposes(stage: str) -> None:
    last = dict(STAGES[stage])
    service = "scheduler" if stage == "scheduler" else "executor"
    listen, metrics = port(default(service, "listen")), default(service, "metrics_port")
    assert last["EXPOSE"].split() == [str(listen), str(metrics)]
    assert f"NANOVLLM_ADDRESS=127.0.0.1:{listen}" in last["ENV"]
    command = last["HEALTHCHECK"].partition(" CMD ")[2]
    assert json.loads(command) == ["nanovllm", "health"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_a_dockerfile_sets_only_variables_that_exist(path: Path) -> None:
    named = set(VARIABLE.findall(path.read_text(encoding="utf-8")))
    assert named
    assert named <= real_variables()


@pytest.mark.parametrize("stage", STAGES)
def test_what_an_image_writes_lies_in_a_volume_or_in_tmp(stage: str) -> None:
    environment = dict(
        pair.split("=", 1) for keyword, rest in STAGES[stage] if keyword == "ENV"
        for pair in rest.split()
    )  # fmt: skip
    created = " ".join(rest for keyword, rest in STAGES[stage] if keyword == "RUN")
    caches = ["HF_HOME", "NANOVLLM_CACHE"]
    if stage == "gpu":
        caches += ["TRITON_CACHE_DIR", "CUDA_CACHE_PATH"]
    for name in caches:
        folder = str(Path(environment[name]).parent)
        assert folder.startswith("/var/cache/nanovllm/")
        assert folder in created, f"{name} is below a folder that the user may not write to"
    assert environment["HOME"] == "/tmp"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_what_is_copied_exists_and_is_part_of_the_build_context(path: Path) -> None:
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    copies = [rest for keyword, rest in instructions(path) if keyword == "COPY"]
    sources = [
        word for rest in copies if not rest.startswith("--from") for word in rest.split()[:-1]
    ]
    assert {"pyproject.toml", *FIRST_PARTY} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), source


def test_the_package_holds_the_stubs_even_if_the_checkout_has_none(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for name in ("protos", *FIRST_PARTY):
        shutil.copytree(ROOT / name, checkout / name)
    shutil.rmtree(checkout / "nanovllm/v1", ignore_errors=True)
    built = tmp_path / "built"
    result = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(built)],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert {"inference_pb2.py", "inference_pb2_grpc.py", "executor_pb2.py"} <= {
        path.name for path in (built / "nanovllm/v1").iterdir()
    }


def requirements(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DOCKER / "requirements.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_schedulers_requirements_leave_torch_out_and_nothing_else() -> None:
    everything = requirements("cpu", "tracing").stdout.splitlines()
    without = requirements("cpu", "tracing", "--without", "torch").stdout.splitlines()
    left_out = set(everything) - set(without)
    assert [re.split(r"\W", line)[0] for line in left_out] == ["torch"]
    assert any(line.startswith("grpcio") for line in without)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["cpus"], "no extra cpus"), (["cpu", "--without", "tensorflow"], "nothing requires tensor")],
)
def test_requirements_that_do_not_exist_are_refused(arguments: list[str], message: str) -> None:
    result = requirements(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
