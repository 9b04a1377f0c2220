"""smg proves nothing to its workers; docs/security.md says what to do instead.

A test that fails here with a later smg says that those pages can offer more.
"""

import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import trustme

from tests.e2e.support import wait_until
from tests.gateway.replicas import skip_without_smg
from tests.gateway.smg_process import running_smg

KEY = "k" * 32
#: First byte of a TLS handshake record, RFC 8446 section 5.1.
TLS_HANDSHAKE = b"\x16"
WORKER = ("--backend", "vllm", "--worker-startup-check-interval", "1")


class Calls(grpc.GenericRpcHandler):
    """Remembers the metadata of each call and serves none."""

    def __init__(self) -> None:
        self.metadata: dict[str, set[str]] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> None:
        names = {name for name, _ in handler_call_details.invocation_metadata}
        self.metadata[handler_call_details.method] = names


@contextmanager
def first_bytes() -> Iterator[tuple[int, list[bytes]]]:
    """A port that hangs up after the first byte, and what they were; b"" if none came."""
    seen: list[bytes] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.settimeout(1)
            try:
                seen.append(self.request.recv(1))
            except OSError:
                seen.append(b"")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,))
        thread.start()
        try:
            yield server.server_address[1], seen
        finally:
            server.shutdown()
            thread.join()


def test_smg_sends_its_workers_no_token_even_with_an_api_key(tmp_path: Path) -> None:
    skip_without_smg()
    calls = Calls()
    server = grpc.server(ThreadPoolExecutor(2), handlers=[calls])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    health_check = "/vllm.grpc.engine.VllmEngine/HealthCheck"
    try:
        arguments = [*WORKER, "--api-key", KEY, "--worker-urls", f"grpc://127.0.0.1:{port}"]
        with running_smg(arguments, tmp_path / "smg.log"):
            wait_until(lambda: health_check in calls.metadata, "smg looks for its worker")
    finally:
        server.stop(None)
    assert calls.metadata[health_check]
    assert "authorization" not in calls.metadata[health_check]


def test_smg_speaks_no_tls_to_grpc_workers_even_with_certificates(tmp_path: Path) -> None:
    skip_without_smg()
    authority = trustme.CA()
    certificate = authority.issue_cert("gateway.example")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    certificate.private_key_pem.write_to_path(tmp_path / "gateway.key")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "gateway.pem")
    given = [
        *("--ca-cert-paths", str(tmp_path / "ca.pem")),
        *("--client-cert-path", str(tmp_path / "gateway.pem")),
        *("--client-key-path", str(tmp_path / "gateway.key")),
    ]
    with first_bytes() as (port, seen):
        arguments = [*WORKER, *given, "--worker-urls", f"grpcs://127.0.0.1:{port}"]
        with running_smg(arguments, tmp_path / "smg.log"):
            wait_until(lambda: len(seen) >= 4, "smg has tried its worker several times")
    assert TLS_HANDSHAKE not in seen
