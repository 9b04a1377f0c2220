"""A service that cannot start says why in one line and exits with status 2."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import executor_service.__main__
import scheduler_service.__main__
from tests.e2e.support import LIMIT_S

EXECUTOR, SCHEDULER = "executor_service", "scheduler_service"
BOTH = pytest.mark.parametrize("module", [EXECUTOR, SCHEDULER])
MAIN = {EXECUTOR: executor_service.__main__.main, SCHEDULER: scheduler_service.__main__.main}
#: Our own log, and that of gRPC's core.
LOG_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO) |[IWE]\d{4} \d\d:\d\d:")
WEIGHTS = "model.safetensors"


class Service:
    """Runs a service that must fail to start, and returns its one line on stderr."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capfd = capfd

    def error(self, module: str, model: Path | str, *arguments: str) -> str:
        """Runs the entry point in this process, which has imported everything already."""
        self._monkeypatch.setattr("sys.argv", [module, *start_arguments(model, arguments)])
        self._capfd.readouterr()
        status = MAIN[module]()
        captured = self._capfd.readouterr()
        return the_line(module, status, captured.out, captured.err)

    def process_error(self, module: str, model: Path | str, *arguments: str, **env: str) -> str:
        """Runs a process."""
        result = subprocess.run(
            [sys.executable, "-m", module, *start_arguments(model, arguments)],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=2 * LIMIT_S,
            check=False,
        )
        return the_line(module, result.returncode, result.stdout, result.stderr)


def start_arguments(model: Path | str, further: tuple[str, ...]) -> list[str]:
    """Later arguments win, so tests override what they need to."""
    return [
        *("--model", str(model), "--listen", "127.0.0.1:0", "--metrics-port", "-1", *further),
    ]


def the_line(module: str, status: int, stdout: str, stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line and not LOG_LINE.match(line)]
    assert status == 2, stderr
    assert "ready" not in stdout
    assert len(lines) == 1, stderr
    assert lines[0].startswith(f"{module}: ")
    return lines[0]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Service:
    return Service(monkeypatch, capfd)


@pytest.fixture(scope="module")
def model(checkpoint: Callable[[str], Path]) -> Path:
    return checkpoint("qwen3")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that a test may damage."""
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


class TestModel:
    @BOTH
    def test_missing_directory_is_named(
        self, service: Service, module: str, tmp_path: Path
    ) -> None:
        missing = tmp_path / "nowhere"
        assert f"{str(missing)!r} does not exist" in service.error(module, missing)

    @BOTH
    def test_directory_without_a_configuration_is_no_model(
        self, service: Service, module: str, tmp_path: Path
    ) -> None:
        assert f"{tmp_path} holds no config.json" in service.error(module, tmp_path)

    @BOTH
    def test_malformed_configuration_is_named(
        self, service: Service, module: str, copy: Path
    ) -> None:
        (copy / "config.json").write_text("{")
        assert "config.json" in service.error(module, copy)

    def test_scheduler_names_a_missing_tokenizer(self, service: Service, copy: Path) -> None:
        (copy / "tokenizer.json").unlink()
        assert "tokenizer.json is missing" in service.error(SCHEDULER, copy)

    def test_scheduler_names_a_malformed_tokenizer(self, service: Service, copy: Path) -> None:
        (copy / "tokenizer.json").write_text("{}")
        assert "tokenizer.json" in service.error(SCHEDULER, copy)

    def test_executor_names_a_directory_without_weights(self, service: Service, copy: Path) -> None:
        (copy / WEIGHTS).unlink()
        assert "no *.safetensors file" in service.error(EXECUTOR, copy)

    def test_executor_names_a_missing_tensor(self, service: Service, copy: Path) -> None:
        tensors = load_file(copy / WEIGHTS)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
        line = service.process_error(EXECUTOR, copy)
        assert "model.layers.1.mlp.up_proj.weight" in line

    def test_executor_names_a_misshapen_tensor(self, service: Service, copy: Path) -> None:
        name = "model.layers.0.self_attn.k_norm.weight"
        tensors = load_file(copy / WEIGHTS)
        tensors[name] = tensors[name][:-1].clone()
        save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
        assert name in service.error(EXECUTOR, copy)

    def test_executor_names_a_truncated_file(self, service: Service, copy: Path) -> None:
        content = (copy / WEIGHTS).read_bytes()
        (copy / WEIGHTS).write_bytes(content[: len(content) // 2])
        assert WEIGHTS in service.error(EXECUTOR, copy)

    def test_executor_names_an_unsupported_architecture(self, service: Service, copy: Path) -> None:
        config = json.loads((copy / "config.json").read_text())
        config |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        (copy / "config.json").write_text(json.dumps(config))
        assert "GPT2LMHeadModel" in service.error(EXECUTOR, copy)


class TestAddresses:
    @BOTH
    def test_taken_port_is_named(
        self, service: Service, module: str, model: Path, taken_port: int
    ) -> None:
        address = f"127.0.0.1:{taken_port}"
        line = service.process_error(module, model, "--listen", address)
        assert f"cannot listen on {address}" in line

    @BOTH
    def test_served_socket_is_not_taken_away(
        self, service: Service, module: str, model: Path, tmp_path: Path
    ) -> None:
        address = f"unix:{tmp_path}/service.sock"
        with socket.socket(socket.AF_UNIX) as owner:
            owner.bind(address.removeprefix("unix:"))
            owner.listen()
            assert f"cannot listen on {address}" in service.error(
                module, model, "--listen", address
            )

    @BOTH
    def test_taken_metrics_port_is_named(
        self, service: Service, module: str, model: Path, taken_port: int
    ) -> None:
        line = service.error(module, model, "--metrics-port", str(taken_port))
        assert f"127.0.0.1:{taken_port}" in line
        assert "--metrics-port" in line

    @BOTH
    @pytest.mark.parametrize("address", ["here", "127.0.0.1:70000", ":50051"])
    def test_malformed_address_is_named(
        self, service: Service, module: str, model: Path, address: str
    ) -> None:
        assert repr(address) in service.error(module, model, "--listen", address)


class TestSettings:
    @pytest.mark.parametrize(
        ("module", "arguments", "expected"),
        [
            (EXECUTOR, ("--max-num-seqs", "0"), "--max-num-seqs"),
            (EXECUTOR, ("--max-num-seqs", "many"), "--max-num-seqs"),
            (EXECUTOR, ("--block-size", "-1"), "--block-size"),
            (EXECUTOR, ("--kv-memory-fraction", "1.5"), "--kv-memory-fraction"),
            (EXECUTOR, ("--kv-memory-fraction", "nan"), "--kv-memory-fraction"),
            (EXECUTOR, ("--attention-backend", "magic"), "--attention-backend"),
            (EXECUTOR, ("--dtype", "int8"), "--dtype"),
            (EXECUTOR, ("--max-model-len", "100000"), "--max-model-len"),
            (EXECUTOR, ("--no-such-setting", "1"), "--no-such-setting"),
            (SCHEDULER, ("--watermark-ratio", "1"), "--watermark-ratio"),
            (SCHEDULER, ("--executor-wait-timeout-s", "-5"), "--executor-wait-timeout-s"),
            (SCHEDULER, ("--executor-stall-timeout-s", "nan"), "--executor-stall-timeout-s"),
            (SCHEDULER, ("--log-level", "loud"), "--log-level"),
            (SCHEDULER, ("--executor", "nowhere"), "--executor"),
        ],
    )
    def test_bad_setting_is_named(
        self, service: Service, model: Path, module: str, arguments: tuple[str, ...], expected: str
    ) -> None:
        assert expected in service.error(module, model, *arguments)

    def test_bad_environment_variable_is_named(self, service: Service, model: Path) -> None:
        line = service.process_error(EXECUTOR, model, NANOVLLM_EXECUTOR_MAX_NUM_SEQS="-3")
        assert "max-num-seqs" in line
        assert "'-3'" in line

    def test_token_budget_that_starves_prefill_is_refused(
        self, service: Service, model: Path
    ) -> None:
        budget = ("--max-num-seqs", "8", "--max-num-batched-tokens", "8")
        line = service.error(EXECUTOR, model, *budget)
        assert "--max-num-batched-tokens 8 must exceed --max-num-seqs 8" in line

    @pytest.mark.parametrize("backend", ["flash_attn", "triton"])
    def test_attention_backend_that_needs_a_gpu_is_refused_on_a_cpu(
        self, service: Service, model: Path, backend: str
    ) -> None:
        line = service.error(EXECUTOR, model, "--device", "cpu", "--attention-backend", backend)
        assert "--attention-backend" in line
