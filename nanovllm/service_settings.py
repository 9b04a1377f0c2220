"""What both services have in common at start-up: settings, listening, logging, the ready line."""

import logging
import socket
import sys
from typing import Literal, Self

import grpc
from prometheus_client import CollectorRegistry, start_http_server
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from nanovllm.channel import KEEPALIVE_OPTIONS, MAX_MESSAGE_BYTES, message_limits

_SHARED_SERVER_OPTIONS: list[tuple[str, int]] = [
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
]
#: Of the server of the public API.
SERVER_OPTIONS = [*_SHARED_SERVER_OPTIONS, *message_limits(MAX_MESSAGE_BYTES)]
#: Of the executor's server, whose only client is a scheduler; see `EXECUTOR_CHANNEL_OPTIONS`.
EXECUTOR_SERVER_OPTIONS = [*_SHARED_SERVER_OPTIONS, *message_limits(-1)]


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

    @classmethod
    def from_arguments(cls, arguments: list[str]) -> Self:
        """Reads command line and environment. Raises StartupError; exits 0 after --help."""
        try:
            return CliApp.run(cls, cli_args=arguments, cli_exit_on_error=False)
        except ValidationError as error:
            problems = "; ".join(
                f"--{'.'.join(map(str, item['loc'])).replace('_', '-')}: {item['msg']}"
                f" (got {item['input']!r})"
                for item in error.errors()
            )
            raise StartupError(problems) from error
        except SettingsError as error:
            raise StartupError(str(error)) from error


def start_logging(level: str) -> None:
    """Logs to stderr; stdout is for the lines that scripts wait for."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


def bind(server: grpc.Server | grpc.aio.Server, address: str) -> str:
    """Listens on HOST:PORT or unix:/path and returns the address with the port that was taken.

    Raises StartupError.
    """
    if address == "unix:":
        raise StartupError("--listen 'unix:' names no path; give unix:/path")
    if not address.startswith("unix:"):
        host, separator, port = address.rpartition(":")
        if not separator or not host or not port.isdecimal() or int(port) > 65535:
            raise StartupError(f"--listen {address!r} is no HOST:PORT and no unix:/path")
    elif _is_served(address.removeprefix("unix:")):
        raise StartupError(f"cannot listen on {address}: it is in use; choose another --listen")
    try:
        bound_port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(
            f"cannot listen on {address}: it is in use or not allowed; choose another --listen"
        ) from error
    return address if address.startswith("unix:") else f"{host}:{bound_port}"


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
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise StartupError(
            f"cannot serve metrics on {host}:{port}: {error.strerror}; choose another "
            "--metrics-port, 0 for a free one or -1 for none"
        ) from error
    print(f"metrics: http://{host}:{server.server_port}/metrics", flush=True)


def announce_ready(address: str) -> None:
    """Tells whoever started this process that it can be used now."""
    print(f"ready: listening on {address}", flush=True)
