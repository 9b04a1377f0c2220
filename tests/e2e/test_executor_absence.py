"""A scheduler without its executor: it stays up, says what is wrong, and serves when it can."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from nanovllm import Client, Health, ServiceProcess, UnavailableError
from nanovllm.v1 import inference_pb2 as pb
from nanovllm.v1 import inference_pb2_grpc as pb_grpc
from tests.checkpoints import make_checkpoint
from tests.e2e.support import (
    CPU,
    LIMIT_S,
    CallError,
    Reference,
    greedy,
    random_prompt,
    wait_until_serving,
)

WAIT_TIMEOUT_S = 1.0


def executor(model: Path, address: str, logs: Path) -> ServiceProcess:
    return ServiceProcess(
        "executor_service",
        [
            *("--model", str(model), "--listen", address, "--metrics-port", "-1", *CPU),
            *("--num-kv-blocks", "64"),
        ],
        log_path=logs / "executor.log",
    )


def scheduler(model: Path, executor_address: str, logs: Path) -> ServiceProcess:
    return ServiceProcess(
        "scheduler_service",
        [
            *("--model", str(model), "--executor", executor_address),
            *("--listen", f"unix:{logs}/scheduler.sock", "--metrics-port", "-1"),
            *("--executor-wait-timeout-s", str(WAIT_TIMEOUT_S)),
        ],
        log_path=logs / "scheduler.log",
    )


def refusal(address: str) -> CallError:
    request = pb.GenerateRequest(text="abc", sampling_params=pb.SamplingParams(max_tokens=1))
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
        list(pb_grpc.InferenceServiceStub(channel).Generate(request, timeout=LIMIT_S))
    return CallError.of(caught.value)


def test_requests_fail_with_the_reason_until_the_executor_appears(
    checkpoint: Callable[[str], Path],
    reference: Callable[[str], Reference],
    tmp_path: Path,
) -> None:
    model, address = checkpoint("qwen3"), f"unix:{tmp_path}/executor.sock"
    with scheduler(model, address, tmp_path) as service:
        service.wait_until_ready(LIMIT_S)
        with Client(service.address) as client:
            assert client.health() is Health.NOT_SERVING
            status = client.server_status()
            assert not status.executor_connected
            assert status.num_kv_blocks == 0
            # What needs no executor works without one.
            assert client.tokenize("abc")
            for _ in range(2):
                error = refusal(service.address)
                assert error.code is grpc.StatusCode.UNAVAILABLE
                assert error.message.startswith(f"no executor for {WAIT_TIMEOUT_S:g} s: ")
                # Where the executor is, is nothing that clients need to know.
                assert "executor.sock" not in error.message
                assert error.retry_after_s is not None
                assert error.retry_after_s > 0
            with executor(model, address, tmp_path) as late:
                late.wait_until_ready(2 * LIMIT_S)
                wait_until_serving(client)
                prompt = random_prompt(12, seed=90)
                output = client.generate(prompt, greedy(8))
                assert output.token_ids == reference("qwen3").greedy(prompt, 8)


def test_executor_of_another_model_is_refused_until_the_right_one_appears(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, address = checkpoint("qwen3"), f"unix:{tmp_path}/executor.sock"
    other = make_checkpoint(tmp_path / "other", "qwen3", num_layers=1)
    service = scheduler(model, address, tmp_path)
    with executor(other, address, tmp_path) as wrong:
        wrong.wait_until_ready(2 * LIMIT_S)
        with service:
            service.wait_until_ready(LIMIT_S)
            with Client(service.address) as client:
                error = refusal(service.address)
                assert error.code is grpc.StatusCode.UNAVAILABLE
                assert "another model" in error.message
                assert "same --model" in error.message
                assert error.retry_after_s is not None
                assert client.health() is Health.NOT_SERVING
                assert wrong.running
                wrong.stop()
                with executor(model, address, tmp_path) as right:
                    right.wait_until_ready(2 * LIMIT_S)
                    wait_until_serving(client)
                    assert len(client.generate("abc", greedy(4)).token_ids) == 4
    assert (tmp_path / "scheduler.log").read_text().count("another model") == 1


def test_request_that_waits_for_the_executor_is_served_when_it_comes_in_time(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model, address = checkpoint("qwen3"), f"unix:{tmp_path}/executor.sock"
    arguments = ["--executor-wait-timeout-s", str(4 * LIMIT_S)]
    patient = scheduler(model, address, tmp_path)
    patient = ServiceProcess(
        patient.module, [*patient.arguments, *arguments], log_path=tmp_path / "log"
    )
    with patient, executor(model, address, tmp_path):
        patient.wait_until_ready(LIMIT_S)
        with Client(patient.address) as client:
            # The executor still imports its libraries.
            assert not client.server_status().executor_connected
            assert len(client.generate("abc", greedy(4), timeout_s=3 * LIMIT_S).token_ids) == 4


def test_wrong_address_is_unavailable_for_the_client_too(tmp_path: Path) -> None:
    with (
        Client(f"unix:{tmp_path}/nobody.sock") as client,
        pytest.raises(UnavailableError, match=r"nobody\.sock is unavailable"),
    ):
        client.generate("abc", greedy(1))


def test_a_scheduler_without_an_executor_is_alive_though_it_does_not_serve(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with scheduler(checkpoint("qwen3"), f"unix:{tmp_path}/nobody.sock", tmp_path) as service:
        service.wait_until_ready(LIMIT_S)
        with Client(service.address) as client:
            assert client.health("liveness") is Health.SERVING
            assert client.health() is Health.NOT_SERVING
