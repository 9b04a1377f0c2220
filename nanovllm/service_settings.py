"""What both services have in common at start-up: settings, listening, the ready line."""

import gc
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

import grpc
from prometheus_client import CollectorRegistry, disable_created_metrics, start_http_server
from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from nanovllm.channel import (
    KEEPALIVE_OPTIONS,
    MAX_MESSAGE_BYTES,
    ChannelOptions,
    check_address,
    is_local,
    message_limits,
)
from nanovllm.logs import LogFormat, fields
from nanovllm.tls import ServerTls, TlsError

#: Calls that one connection may have open. gRPC lets more wait in the client, or refuses them with
#: UNAVAILABLE.
MAX_CALLS_PER_CONNECTION = 4096
#: Headers of one call: what is larger is always refused, and may be refused from half of it on.
MAX_METADATA_BYTES = 16 * 1024
# A scheduler has one stream and a few short calls.
_MAX_EXECUTOR_CALLS_PER_CONNECTION = 64

_SHARED_SERVER_OPTIONS: ChannelOptions = [
    # Two processes on one port would each get half of the connections.
    ("grpc.so_reuseport", 0),
    # Calls of peers that vanished end. The peer's HTTP/2 layer answers the pings, so a client that
    # is only idle or slow stays connected.
    *KEEPALIVE_OPTIONS,
    ("grpc.http2.max_pings_without_data", 0),
    # Gateways and load balancers ping idle connections; do not punish them for it.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES // 2),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
]
#: Of the server of the public API.
SERVER_OPTIONS: ChannelOptions = [
    *_SHARED_SERVER_OPTIONS,
    *message_limits(MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),
]
#: Of the executor's server, whose only client is a scheduler; see `EXECUTOR_CHANNEL_OPTIONS`.
EXECUTOR_SERVER_OPTIONS: ChannelOptions = [
    *_SHARED_SERVER_OPTIONS,
    *message_limits(-1),
    ("grpc.max_concurrent_streams", _MAX_EXECUTOR_CALLS_PER_CONNECTION),
]


logger = logging.getLogger(__name__)


#: HOST:PORT or unix:/path, as a setting.
Address: TypeAlias = Annotated[str, AfterValidator(check_address)]


class StartupError(RuntimeError):
    """The service cannot start; the message is one line that says what to change."""


class ServiceSettings(BaseSettings):
    """Settings that both services take."""

    model_config = SettingsConfigDict(
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        env_ignore_empty=True,
        # No setting means anything when it is infinite.
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    model: str = Field(
        "smollm2-135m-instruct", description="Model directory, hub id, or embedded model's name."
    )
    metrics_host: str = Field("127.0.0.1", description="Address that serves /metrics.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log lines to print."
    )
    log_format: LogFormat = Field(
        "text", description="Log lines as text, or as JSON with one object a line."
    )
    tls_cert: Path | None = Field(
        None, description="PEM file of the server's certificate and its chain; turns TLS on."
    )
    tls_key: Path | None = Field(
        None, description="PEM file of the certificate's private key, not encrypted."
    )
    tls_client_ca: Path | None = Field(
        None, description="PEM file of authorities; only clients with a certificate of theirs."
    )
    insecure: bool = Field(
        False, description="Allow plaintext and unknown peers beyond this machine."
    )

    @classmethod
    def from_arguments(cls, arguments: list[str]) -> Self:
        """Reads command line and environment. Raises StartupError; exits 0 after --help."""
        try:
            return CliApp.run(cls, cli_args=arguments, cli_exit_on_error=False)
        except ValidationError as error:
            problems = "; ".join(
                f"--{'.'.join(map(str, item['loc'])).replace('_', '-')}: "
                f"{item['msg'].removeprefix('Value error, ')} (got {item['input']!r})"
                for item in error.errors()
            )
            raise StartupError(problems) from error
        except SettingsError as error:
            raise StartupError(str(error)) from error


def server_tls(settings: ServiceSettings) -> ServerTls | None:
    """Reads the server's certificate, if there is one. Raises StartupError."""
    if settings.tls_cert is None and settings.tls_key is None:
        if settings.tls_client_ca is not None:
            raise StartupError("--tls-client-ca needs --tls-cert and --tls-key")
        return None
    if settings.tls_cert is None or settings.tls_key is None:
        raise StartupError("--tls-cert and --tls-key come together; give both or neither")
    try:
        return ServerTls(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    except TlsError as error:
        raise StartupError(f"--tls-cert, --tls-key, --tls-client-ca: {error}") from error


def check_exposure(
    address: str, settings: ServiceSettings, *, is_protected: bool, remedy: str
) -> None:
    """Raises StartupError if an address leaves this machine unprotected; --insecure only warns.

    Args:
        address: HOST:PORT or unix:/path.
        settings: Where --insecure is.
        is_protected: Whether traffic and peers are protected, wherever they are.
        remedy: What would protect them, for the error.
    """
    if is_protected or is_local(address):
        return
    if not settings.insecure:
        raise StartupError(
            f"{address} reaches beyond this machine; {remedy}, or accept plaintext and unknown "
            "peers with --insecure"
        )
    logger.warning(
        "reachable from beyond this machine unprotected, as --insecure allows",
        extra=fields(address=address),
    )


def bind(
    server: grpc.Server | grpc.aio.Server,
    address: str,
    tls: ServerTls | None = None,
    *,
    only_owner: bool = False,
    option: str = "--listen",
) -> str:
    """Listens on HOST:PORT or unix:/path and returns the address with the port that was taken.

    `only_owner` keeps other users from connecting to a unix socket; `option` is the setting that
    errors name. Raises StartupError.
    """
    if address.startswith("unix:") and _is_served(address.removeprefix("unix:")):
        raise StartupError(f"cannot listen on {address}: it is in use; choose another {option}")
    try:
        with _private_files(only_owner):
            bound_port = (
                server.add_insecure_port(address)
                if tls is None
                else server.add_secure_port(address, tls.credentials())
            )
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {address}: it is in use or not allowed; choose another {option}"
        ) from error
    if address.startswith("unix:"):
        return address
    return f"{address.rpartition(':')[0]}:{bound_port}"


@contextmanager
def _private_files(enabled: bool) -> Iterator[None]:
    """Creates files that are the owner's alone from their first moment on, mode 0600 at most."""
    if not enabled:
        yield
        return
    umask = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(umask)


def _is_served(path: str) -> bool:
    """Whether a process accepts connections on a unix socket. gRPC would just take it away."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def serve_metrics(registry: CollectorRegistry, host: str, port: int) -> None:
    """Serves /metrics and prints where; -1 does nothing. Raises StartupError."""
    if port < 0:
        return
    # A second series for every counter and histogram, which nothing reads.
    disable_created_metrics()
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise StartupError(
            f"cannot serve metrics on {host}:{port}: {error.strerror}; choose another "
            "--metrics-port, 0 for a free one or -1 for none"
        ) from error
    print(f"metrics: http://{host}:{server.server_port}/metrics", flush=True)


def freeze_heap() -> None:
    """Leaves everything that exists now out of later garbage collections.

    Modules, settings and the model live as long as the process. A full collection that walks them
    stops all threads for about a tenth of a second, in the middle of requests.
    """
    gc.collect()
    gc.freeze()


def announce_ready(address: str) -> None:
    """Tells whoever started this process that it can be used now."""
    print(f"ready: listening on {address}", flush=True)
