"""Every program under examples/ runs against real services, as docs/clients.md shows it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from nanovllm import LocalServices
from tests.gateway.replicas import MODEL, make_ascii_checkpoint, skip_without_smg

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
CLIENTS = (ROOT / "docs/clients.md").read_text(encoding="utf-8")
LIMIT_S = 120.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the place of a real one."""
    return make_ascii_checkpoint(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture(scope="module")
def services(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServices]:
    with LocalServices(
        str(model),
        executor_args=["--device", "cpu", "--num-kv-blocks", "1024"],
        listen="tcp",
        env={"OMP_NUM_THREADS": "1"},
        log_dir=tmp_path_factory.mktemp("logs"),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def environment(services: LocalServices) -> dict[str, str]:
    """The environment of a user who installed the package and uses these services."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {"PATH": path, "PYTHONPATH": str(ROOT), "NANOVLLM_ADDRESS": services.address}
    return {**os.environ, **variables}


def run(command: Sequence[str], environment: Mapping[str, str], cwd: Path = ROOT) -> str:
    """Standard output of a command that must succeed."""
    result = subprocess.run(
        command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_blocking_client(environment: dict[str, str]) -> None:
    output = run([sys.executable, "examples/python_sync.py"], environment)
    assert "[length, " in output
    assert "1: '" in output
    assert "refused: ('sampling_params.top_p',)" in output


def test_the_asyncio_client(environment: dict[str, str]) -> None:
    output = run([sys.executable, "examples/python_asyncio.py"], environment)
    assert len(output.splitlines()) == 4
    assert re.search(r"gave up after \d+ tokens", output)


def test_buf_curl(environment: dict[str, str]) -> None:
    if shutil.which("buf", path=environment["PATH"]) is None:
        pytest.skip("buf is not installed; it comes with the extra dev")
    output = run(["sh", "examples/buf_curl.sh"], environment)
    assert '"status": "SERVING"' in re.sub(r":\s*", ": ", output)
    assert "FINISH_REASON_LENGTH" in output
    assert re.search(r'"healthy":\s*true', output)


def test_node(environment: dict[str, str], tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node and npm are not installed")
    # Not beside the sources, which shall stay as they are.
    shutil.copytree(EXAMPLES / "node", tmp_path / "examples/node")
    (tmp_path / "protos").symlink_to(ROOT / "protos")
    folder = tmp_path / "examples/node"
    install = [npm, "install", "--no-audit", "--no-fund", "--silent"]
    try:
        installed = subprocess.run(install, cwd=folder, capture_output=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        pytest.skip("npm could not reach its registry in time")
    if installed.returncode:
        pytest.skip("npm could not install grpc-js; is its registry reachable?")
    output = run([npm, "start", "--silent"], environment, folder)
    assert "[FINISH_REASON_LENGTH, 48 tokens]" in output
    assert "refused: INVALID_ARGUMENT sampling_params.top_p" in output


@pytest.mark.slow
def test_openai_through_the_gateway(
    environment: dict[str, str], model: Path, tmp_path: Path
) -> None:
    skip_without_smg()
    command = [sys.executable, "-m", "examples.openai_gateway", "--model", str(model)]
    output = run([*command, "--device", "cpu", "--log-dir", str(tmp_path)], environment)
    assert f"model: {MODEL}" in output
    assert "1: '" in output
    assert "sampling_params.json_schema: is not supported" in output


def test_the_document_names_every_example() -> None:
    named = set(re.findall(r"examples/[\w/]+\.(?:py|sh|js)", CLIENTS))
    files = {
        path.relative_to(ROOT).as_posix()
        for path in EXAMPLES.rglob("*")
        if path.suffix in (".py", ".sh", ".js") and "node_modules" not in path.parts
    }
    assert named == files - {"examples/__init__.py"}
