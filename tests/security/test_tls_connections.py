"""TLS between real peers over loopback."""

import os
import socket
import ssl
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from nanovllm import Client, Health, TlsConfig, UnavailableError
from nanovllm.service_settings import bind
from nanovllm.tls import ClientTls, ServerTls
from tests.security.pki import Pki

Serve = Callable[[ServerTls], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serves the health service and returns the address."""
    servers: list[grpc.Server] = []

    def start(tls: ServerTls) -> str:
        server = grpc.server(ThreadPoolExecutor(2))
        servicer = health.HealthServicer()
        servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        address = bind(server, "127.0.0.1:0", tls)
        server.start()
        servers.append(server)
        return address

    yield start
    for server in servers:
        server.stop(None).wait()


def check(address: str, tls: TlsConfig | None) -> Health:
    with Client(address, tls=tls) as client:
        return client.health(timeout_s=20)


def test_a_client_that_trusts_the_authority_is_served(serve: Serve, pki: Pki):
    server = pki.issue("127.0.0.1")
    address = serve(ServerTls(server.cert, server.key))
    assert check(address, TlsConfig(ca=pki.ca)) is Health.SERVING


def test_a_server_of_another_authority_or_name_is_not_trusted(
    serve: Serve, pki: Pki, tmp_path: Path
):
    server = pki.issue("server.example")
    address = serve(ServerTls(server.cert, server.key))
    with pytest.raises(UnavailableError):
        check(address, TlsConfig(ca=pki.ca))
    other = Pki(tmp_path / "other")
    with pytest.raises(UnavailableError):
        check(address, TlsConfig(ca=other.ca, server_name="server.example"))
    assert check(address, TlsConfig(ca=pki.ca, server_name="server.example")) is Health.SERVING


def test_plaintext_is_not_served_on_a_port_with_tls(serve: Serve, pki: Pki):
    server = pki.issue("127.0.0.1")
    address = serve(ServerTls(server.cert, server.key))
    with pytest.raises(UnavailableError):
        check(address, None)


def test_with_a_client_authority_only_its_certificates_are_let_in(
    serve: Serve, pki: Pki, tmp_path: Path
):
    server, client = pki.issue("127.0.0.1"), pki.issue("client")
    foreign = Pki(tmp_path / "other").issue("client")
    address = serve(ServerTls(server.cert, server.key, pki.ca))
    assert check(address, TlsConfig(pki.ca, client.cert, client.key)) is Health.SERVING
    for stranger in (TlsConfig(pki.ca), TlsConfig(pki.ca, foreign.cert, foreign.key)):
        with pytest.raises(UnavailableError):
            check(address, stranger)


def test_new_connections_get_a_renewed_certificate_and_a_broken_one_changes_nothing(
    serve: Serve, pki: Pki
):
    identity = pki.issue("127.0.0.1", file="server")
    address = serve(ServerTls(identity.cert, identity.key))
    first = certificate_of(address, pki)
    assert certificate_of(address, pki) == first
    pki.issue("127.0.0.1", file="server")
    second = certificate_of(address, pki)
    assert second != first
    identity.cert.write_text("broken")
    assert certificate_of(address, pki) == second
    assert check(address, TlsConfig(ca=pki.ca)) is Health.SERVING
    pki.issue("127.0.0.1", file="server")
    assert certificate_of(address, pki) not in (first, second)


def test_every_server_of_a_process_gets_the_renewed_certificate(serve: Serve, pki: Pki):
    identity = pki.issue("127.0.0.1", file="server")
    tls = ServerTls(identity.cert, identity.key)
    addresses = [serve(tls), serve(tls)]
    first = {certificate_of(address, pki) for address in addresses}
    pki.issue("127.0.0.1", file="server")
    second = {certificate_of(address, pki) for address in addresses}
    assert len(first) == len(second) == 1
    assert first != second


def test_a_renewed_authority_decides_about_the_next_clients(serve: Serve, pki: Pki, tmp_path: Path):
    server, client = pki.issue("127.0.0.1"), pki.issue("client")
    newer = Pki(tmp_path / "newer")
    newcomer = newer.issue("client")
    authorities = tmp_path / "clients.pem"
    authorities.write_bytes(pki.ca.read_bytes())
    address = serve(ServerTls(server.cert, server.key, authorities))
    with pytest.raises(UnavailableError):
        check(address, TlsConfig(pki.ca, newcomer.cert, newcomer.key))
    new = tmp_path / "new.pem"
    new.write_bytes(newer.ca.read_bytes())
    os.replace(new, authorities)
    assert check(address, TlsConfig(pki.ca, newcomer.cert, newcomer.key)) is Health.SERVING
    with pytest.raises(UnavailableError):
        check(address, TlsConfig(pki.ca, client.cert, client.key))


def test_the_scheduler_shows_a_renewed_certificate_on_its_next_connection(pki: Pki):
    identity = pki.issue("scheduler")
    tls = ClientTls(TlsConfig(pki.ca, identity.cert, identity.key))
    first = tls.credentials()
    assert tls.credentials() is first
    pki.issue("scheduler")
    assert tls.credentials() is not first


@pytest.mark.parametrize(
    ("version", "is_accepted"),
    [
        (ssl.TLSVersion.TLSv1_1, False),
        (ssl.TLSVersion.TLSv1_2, True),
        (ssl.TLSVersion.TLSv1_3, True),
    ],
)
def test_only_tls_1_2_and_newer_are_spoken(
    serve: Serve, pki: Pki, version: ssl.TLSVersion, is_accepted: bool
):
    server = pki.issue("127.0.0.1")
    address = serve(ServerTls(server.cert, server.key))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context = client_context(pki)
        # OpenSSL refuses the old versions itself at its usual level.
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = version
    if is_accepted:
        assert handshake(address, context)
    else:
        with pytest.raises((ssl.SSLError, OSError)):
            handshake(address, context)


def certificate_of(address: str, pki: Pki) -> bytes:
    """What a new connection is shown."""
    return handshake(address, client_context(pki))


def client_context(pki: Pki) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(pki.ca))
    context.set_alpn_protocols(["h2"])
    return context


def handshake(address: str, context: ssl.SSLContext) -> bytes:
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=20) as connection,
        context.wrap_socket(connection, server_hostname=host) as tls,
    ):
        return tls.getpeercert(binary_form=True) or b""
