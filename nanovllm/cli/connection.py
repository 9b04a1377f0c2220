"""Options that say which server to talk to, and how, for every command that talks to one."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from nanovllm.aio import AsyncClient
from nanovllm.channel import check_address
from nanovllm.cli.options import CommandError
from nanovllm.client import Client
from nanovllm.tls import TlsConfig

DEFAULT_ADDRESS = "127.0.0.1:50051"
ADDRESS_VARIABLE = "NANOVLLM_ADDRESS"
TOKEN_VARIABLE = "NANOVLLM_TOKEN"
# The words that the services' settings take too.
_ON = frozenset({"1", "true", "t", "yes", "y", "on"})
_OFF = frozenset({"", "0", "false", "f", "no", "n", "off"})


class ClientArguments(TypedDict):
    """Arguments that `Client` and `AsyncClient` have in common."""

    token: str | None
    tls: TlsConfig | None
    insecure: bool


def add_connection(
    parser: argparse.ArgumentParser,
    *,
    server: str = "the scheduler",
    default_address: str = DEFAULT_ADDRESS,
    address_variable: str = ADDRESS_VARIABLE,
) -> None:
    """Adds --address and what protects the connection."""
    parser.add_argument(
        "--address",
        type=_address,
        default=os.environ.get(address_variable, default_address),
        metavar="HOST:PORT",
        help=f"{server}, also unix:/path (default: ${address_variable} or {default_address})",
    )
    group = parser.add_argument_group("security", "For servers with TLS or tokens.")
    # Not the token itself: other users can read command lines.
    _add_file(group, "--token-file", f"file with the token alone (default: ${TOKEN_VARIABLE})")
    group.add_argument(
        "--tls",
        action="store_true",
        help="use TLS; implied by the options below (default: $NANOVLLM_TLS, true or false)",
    )
    _add_file(group, "--tls-ca", "PEM authorities of the server; default: public ones")
    _add_file(group, "--tls-cert", "PEM certificate of this client")
    _add_file(group, "--tls-key", "its PEM private key")
    group.add_argument(
        "--tls-server-name",
        default=os.environ.get("NANOVLLM_TLS_SERVER_NAME"),
        metavar="NAME",
        help="name in the server's certificate ($NANOVLLM_TLS_SERVER_NAME)",
    )
    group.add_argument(
        "--insecure",
        action="store_true",
        help="let the token cross a network in plaintext (default: $NANOVLLM_INSECURE, likewise)",
    )


def connect(options: argparse.Namespace, *, timeout_s: float | None = None) -> Client:
    """Returns a client for the options. Raises CommandError."""
    with _command_errors():
        return Client(options.address, timeout_s=timeout_s, **client_arguments(options))


def connect_async(options: argparse.Namespace, *, share_call: bool = False) -> AsyncClient:
    """Returns an asyncio client for the options. Raises CommandError."""
    with _command_errors():
        return AsyncClient(options.address, share_call=share_call, **client_arguments(options))


def client_arguments(options: argparse.Namespace) -> ClientArguments:
    """Returns what the options say. Raises ValueError."""
    named = (options.tls_ca, options.tls_cert, options.tls_key, options.tls_server_name)
    tls = None
    if options.tls or any(named) or _is_on("NANOVLLM_TLS"):
        tls = TlsConfig(
            ca=options.tls_ca,
            cert=options.tls_cert,
            key=options.tls_key,
            server_name=options.tls_server_name,
        )
    insecure = options.insecure or _is_on("NANOVLLM_INSECURE")
    return ClientArguments(token=_token(options.token_file), tls=tls, insecure=insecure)


def _token(path: Path | None) -> str | None:
    if path is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} holds no token: it is no UTF-8 text") from error
    if not token:
        raise ValueError(f"{path} is empty; write the token into it")
    return token


def _is_on(variable: str) -> bool:
    text = os.environ.get(variable, "").strip().lower()
    if text not in _ON | _OFF:
        raise ValueError(f"${variable} is {text!r}; set it to true or false")
    return text in _ON


def _add_file(group: "argparse._ArgumentGroup", option: str, meaning: str) -> None:
    variable = "NANOVLLM" + option.removeprefix("-").replace("-", "_").upper()
    default = os.environ.get(variable)
    group.add_argument(
        option,
        type=Path,
        default=Path(default) if default else None,
        metavar="FILE",
        help=f"{meaning} (${variable})",
    )


@contextmanager
def _command_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CommandError(str(error)) from error


def _address(text: str) -> str:
    try:
        return check_address(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
