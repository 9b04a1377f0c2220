"""Both real services with everything on: TLS both ways, tokens, an administrator's socket."""

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanovllm import (
    AuthenticationError,
    Client,
    Health,
    LocalServices,
    SamplingParams,
    TlsConfig,
    UnavailableError,
)
from nanovllm.admin import AdminClient
from tests.e2e.support import CPU, wait_until
from tests.security.callers import ALICE, BOB
from tests.security.pki import Identity, Pki

PARAMS = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPT = list(range(40))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the services have their other files."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def services(checkpoint: Path, pki: Pki, folder: Path) -> Iterator[LocalServices]:
    tokens = folder / "tokens"
    tokens.write_text(f"alice:{ALICE}\nbob:{BOB}\n")
    tokens.chmod(0o600)
    executor, scheduler = pki.issue("127.0.0.1", file="executor"), pki.issue("scheduler.example")
    with LocalServices(
        str(checkpoint),
        executor_args=[*CPU, "--block-size", "16", *server_options(executor, pki)],
        scheduler_args=[
            *server_options(scheduler, pki),
            *("--executor-tls-ca", str(pki.ca), "--executor-tls-cert", str(scheduler.cert)),
            *("--executor-tls-key", str(scheduler.key)),
            *("--auth-tokens-file", str(tokens)),
            *("--admin-listen", f"unix:{folder}/admin.sock"),
        ],
        listen="tcp",
        log_dir=folder,
        startup_timeout_s=120.0,
    ) as running:
        yield running
    for log in folder.glob("*.log"):
        assert "Traceback" not in (text := log.read_text()), text


def server_options(identity: Identity, pki: Pki) -> list[str]:
    return [
        *("--tls-cert", str(identity.cert), "--tls-key", str(identity.key)),
        *("--tls-client-ca", str(pki.ca)),
    ]


@pytest.fixture(scope="module")
def tls(pki: Pki) -> TlsConfig:
    """What a customer's client has."""
    identity = pki.issue("customer.example")
    return TlsConfig(pki.ca, identity.cert, identity.key, "scheduler.example")


def test_a_request_crosses_both_hops_encrypted_and_tenants_stay_apart(
    services: LocalServices, tls: TlsConfig
):
    with (
        Client(services.address, token=ALICE, tls=tls) as alice,
        Client(services.address, token=BOB, tls=tls) as bob,
    ):
        wait_until(lambda: alice.health() is Health.SERVING, "the executor is connected")
        first = alice.generate(PROMPT, PARAMS)
        assert len(first.token_ids) == 8
        assert alice.generate(PROMPT, PARAMS).num_cached_tokens == 32
        other = bob.generate(PROMPT, PARAMS)
        assert other.num_cached_tokens == 0
        assert other.token_ids == first.token_ids


def test_neither_hop_lets_strangers_in(
    services: LocalServices, tls: TlsConfig, pki: Pki, tmp_path: Path
):
    foreign = Pki(tmp_path / "foreign").issue("customer.example")
    for address, name in (
        (services.address, "scheduler.example"),
        (services.executor_address, "127.0.0.1"),
    ):
        for stranger in (
            None,
            TlsConfig(pki.ca, server_name=name),
            TlsConfig(pki.ca, foreign.cert, foreign.key, name),
        ):
            with Client(address, tls=stranger) as client, pytest.raises(UnavailableError):
                client.health(timeout_s=20)
    with Client(services.address, tls=tls) as client:
        with pytest.raises(AuthenticationError):
            client.generate(PROMPT, PARAMS)
        assert client.health() is Health.SERVING


def test_an_administrator_has_a_socket_of_the_services_user(
    services: LocalServices, tls: TlsConfig, folder: Path
):
    path = folder / "admin.sock"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with (
        Client(services.address, token=ALICE, tls=tls) as client,
        AdminClient(f"unix:{path}") as admin,
    ):
        wait_until(lambda: client.health() is Health.SERVING, "the executor is connected")
        endless = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
        with client.stream(PROMPT, endless) as stream:
            next(stream)
            (live,) = admin.state().requests
            assert (live.request_id, live.caller) == (stream.request_id, "token:alice")
        admin.drain()
        assert client.health() is Health.NOT_SERVING
        with pytest.raises(UnavailableError, match="drained"):
            client.generate(PROMPT, PARAMS)
        admin.undrain()
        assert client.generate(PROMPT, PARAMS).token_ids
        wait_until(lambda: not admin.state().requests, "no request is live")
        assert admin.flush_prefix_cache() > 0
