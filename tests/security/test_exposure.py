"""What is reachable from elsewhere is protected, or the service does not start."""

import argparse
import logging
import os
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from executor_service.server import serve as serve_executor
from executor_service.settings import ExecutorSettings
from nanovllm.access import Access
from nanovllm.channel import is_local
from nanovllm.cli.connection import ClientArguments, add_connection, client_arguments
from nanovllm.service_settings import StartupError, bind
from nanovllm.tls import TlsConfig
from scheduler_service.access.security import Security
from scheduler_service.settings import SchedulerSettings
from tests.security.pki import Identity, Pki


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("unix:/tmp/s", True),
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("localhost:1", True),
        ("[::1]:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("10.0.0.5:1", False),
        ("127.example.com:1", False),
        ("localhost.example.com:1", False),
        ("ipv4:127.0.0.1,10.0.0.5:1", False),
    ],
)
def test_only_loopback_and_sockets_are_on_this_machine(address: str, local: bool):
    assert is_local(address) is local


def security(*arguments: str) -> Security:
    return Security.of(SchedulerSettings.from_arguments([*arguments]))


def tls(identity: Identity) -> tuple[str, ...]:
    return ("--tls-cert", str(identity.cert), "--tls-key", str(identity.key))


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("--listen", "0.0.0.0:50051"), "--tls-cert and --tls-key"),
        (("--executor", "10.0.0.5:50052"), "--executor-tls-ca"),
        (("--executor", "127.0.0.1:50052,10.0.0.5:50052"), "--executor-tls-ca"),
        (("--admin-listen", "[::]:50050"), "--admin-tokens-file"),
    ],
)
def test_the_scheduler_refuses_plaintext_beyond_this_machine(
    arguments: tuple[str, ...], remedy: str, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(StartupError, match=r"reaches beyond this machine.*--insecure") as caught:
        security(*arguments)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)
    with caplog.at_level(logging.WARNING, logger="nanovllm.service_settings"):
        security(*arguments, "--insecure")
    warnings = [item for item in caplog.records if item.name == "nanovllm.service_settings"]
    assert len(warnings) == 1


def test_with_tls_the_scheduler_may_listen_anywhere(pki: Pki, tmp_path: Path):
    identity = pki.issue("server")
    assert security("--listen", "0.0.0.0:50051", *tls(identity)).tls is not None
    tokens = tmp_path / "tokens"
    tokens.write_text(f"root:{'r' * 32}\n")
    tokens.chmod(0o600)
    # An administrator needs more than the encryption that every caller has.
    with pytest.raises(StartupError, match="--admin-tokens-file"):
        security("--admin-listen", "0.0.0.0:50050", *tls(identity))
    security("--admin-listen", "0.0.0.0:50050", *tls(identity), "--admin-tokens-file", str(tokens))


def test_without_further_settings_nothing_is_in_the_way():
    defaults = security()
    assert defaults.tls is None
    assert defaults.executor_tls is None


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--tls-cert", "/c"), "come together"),
        (("--tls-key", "/k"), "come together"),
        (("--tls-client-ca", "/ca"), "needs --tls-cert"),
        (("--tls-cert", "/c", "--tls-key", "/k"), "cannot read /c"),
        (("--executor-tls-cert", "/c"), "need --executor-tls-ca"),
        (("--executor-tls-ca", "/ca"), "cannot read /ca"),
        (("--executor-tls-ca", "/ca", "--executor-tls-cert", "/c"), "come together"),
        (("--auth-tokens-file", "/t"), "--auth-tokens-file: cannot read /t"),
        (("--admin-tokens-file", "/t"), "--admin-tokens-file: cannot read /t"),
    ],
)
def test_settings_that_do_not_add_up_are_named(arguments: tuple[str, ...], problem: str):
    with pytest.raises(StartupError, match=problem) as caught:
        security(*arguments)
    assert "\n" not in str(caught.value)


def test_an_executor_elsewhere_accepts_nobody_without_a_certificate(pki: Pki):
    identity = pki.issue("executor")
    for arguments in ((), tls(identity)):
        settings = ExecutorSettings.from_arguments(["--listen", "0.0.0.0:0", *arguments])
        with pytest.raises(StartupError, match="--tls-client-ca"):
            serve_executor(settings)


def test_the_socket_of_an_executor_belongs_to_its_user_alone(tmp_path: Path):
    path = tmp_path / "executor.sock"
    server = grpc.server(ThreadPoolExecutor(1))
    umask = os.umask(0)
    try:
        bind(server, f"unix:{path}", only_owner=True)
        assert os.umask(0) == 0
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
    finally:
        os.umask(umask)
        server.stop(None)


def test_a_client_does_not_send_its_token_in_plaintext_over_a_network(pki: Pki):
    token = "t" * 32
    with pytest.raises(ValueError, match="in plaintext"):
        Access(token).channel("server.example:50051")
    for access, address in (
        (Access(token), "127.0.0.1:1"),
        (Access(token, insecure=True), "server.example:1"),
        (Access(token, tls=TlsConfig(pki.ca)), "server.example:1"),
        (Access(token, credentials=grpc.ssl_channel_credentials()), "server.example:1"),
    ):
        access.channel(address).close()
    assert token not in repr(Access(token))


@pytest.mark.parametrize("token", ["a\nb", "ä", "\x7f"])
def test_a_token_that_is_no_header_is_refused_at_once(token: str):
    with pytest.raises(ValueError, match="printable ASCII"):
        Access(token)


def connection(*arguments: str) -> ClientArguments:
    """What a command makes of its options and the environment."""
    parser = argparse.ArgumentParser()
    add_connection(parser)
    return client_arguments(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("text", "is_on"), [("true", True), ("1", True), ("false", False), ("0", False), ("", False)]
)
def test_a_switch_in_the_environment_means_what_it_says(
    text: str, is_on: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("NANOVLLM_INSECURE", text)
    monkeypatch.setenv("NANOVLLM_TLS", text)
    arguments = connection()
    assert arguments["insecure"] is is_on
    assert (arguments["tls"] is not None) is is_on
    assert connection("--insecure")["insecure"]


def test_a_switch_that_says_neither_yes_nor_no_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NANOVLLM_INSECURE", "maybe")
    with pytest.raises(ValueError, match=r"\$NANOVLLM_INSECURE is 'maybe'; set it to true or"):
        connection()


@pytest.mark.parametrize(
    ("content", "problem"), [(b"", "is empty"), (b" \n", "is empty"), (b"\xff", "no UTF-8 text")]
)
def test_a_token_file_without_a_token_is_named(tmp_path: Path, content: bytes, problem: str):
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem):
        connection("--token-file", str(path))
    path.write_text(f"{'t' * 32}\n")
    assert connection("--token-file", str(path))["token"] == "t" * 32
