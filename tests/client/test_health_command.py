"""`nanovllm health`, which container runtimes call."""

import socket

import pytest
from grpc_health.v1 import health_pb2

from nanovllm.cli import main

LIVENESS = "liveness"


def test_a_serving_server_is_status_zero(server, capsys):
    assert main(["health", "--address", server.address]) == 0
    assert capsys.readouterr().out == "serving\n"


def test_a_server_that_does_not_serve_is_one_line_and_status_one(server, capsys):
    server.health.enter_graceful_shutdown()
    assert main(["health", "--address", server.address]) == 1
    assert capsys.readouterr().err == f"nanovllm: {server.address} is not serving\n"


def test_one_service_has_a_health_of_its_own(server):
    server.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    server.health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
    assert main(["health", "--address", server.address, "--service", LIVENESS]) == 0
    assert main(["health", "--address", server.address]) == 1


def test_an_unknown_service_is_status_one(server):
    assert main(["health", "--address", server.address, "--service", "other"]) == 1


def test_nobody_there_is_status_one(server):
    server.stop()
    assert main(["health", "--address", server.address]) == 1


def test_a_server_that_does_not_answer_is_given_up_on(capsys):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert main(["health", "--address", address, "--timeout-s", "0.2"]) == 1
    assert capsys.readouterr().err == f"nanovllm: {address} did not answer within 0.2 s\n"


@pytest.mark.parametrize("timeout", ["0", "-1", "x"])
def test_a_timeout_that_is_no_time_is_wrong_usage(timeout):
    with pytest.raises(SystemExit) as caught:
        main(["health", "--timeout-s", timeout])
    assert caught.value.code == 2


def test_the_address_comes_from_the_environment(server, monkeypatch):
    monkeypatch.setenv("NANOVLLM_ADDRESS", server.address)
    assert main(["health"]) == 0
