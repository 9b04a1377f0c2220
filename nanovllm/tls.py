"""TLS files and what gRPC makes of them: checked with one-line errors, read again when they change.

Both ends speak TLS 1.2 or newer; gRPC's own TLS library offers nothing older.
"""

import os
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import grpc

from nanovllm.reloading import Reloading


class TlsError(ValueError):
    """A certificate or key cannot be used; the message is one line that names the file."""


@dataclass(frozen=True, slots=True)
class TlsConfig:
    """How a client trusts a server and proves who it is itself."""

    #: PEM file of the authorities that may have signed the server's certificate; default: the
    #: public ones that gRPC brings along.
    ca: Path | None = None
    #: PEM file of this client's certificate, its chain after it; for servers that ask for one.
    cert: Path | None = None
    #: PEM file of its private key, not encrypted.
    key: Path | None = None
    #: Name that the server's certificate must have, if it is not the host of the address.
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise TlsError("a client certificate and its key come together; give both or neither")

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that the configuration names."""
        return tuple(path for path in (self.ca, self.cert, self.key) if path is not None)

    def credentials(self) -> grpc.ChannelCredentials:
        """Reads the files. Raises TlsError."""
        ca = None if self.ca is None else read_authorities(self.ca)
        if self.cert is None or self.key is None:
            return grpc.ssl_channel_credentials(ca)
        chain, key = read_identity(self.cert, self.key)
        return grpc.ssl_channel_credentials(ca, key, chain)

    def options(self) -> list[tuple[str, str]]:
        """Returns the gRPC channel options that belong to the credentials."""
        return [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []


def read_authorities(path: Path) -> bytes:
    """Reads certificates of authorities. Raises TlsError."""
    pem = _read(path)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=pem.decode("ascii"))
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as error:
        raise TlsError(f"{path} holds no valid PEM certificates") from error
    return pem


def read_identity(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """Reads a certificate chain and its private key, which must match. Raises TlsError."""
    chain_pem, key_pem = _read(cert), _read(key)
    _check_identity(cert, chain_pem, key, key_pem)
    return chain_pem, key_pem


class ClientTls:
    """A TlsConfig for channels that are opened again and again, each with the newest files."""

    def __init__(self, config: TlsConfig) -> None:
        """Reads the files. Raises TlsError."""
        self._credentials = Reloading(config.files, config.credentials)
        self.options = config.options()

    def credentials(self) -> grpc.ChannelCredentials:
        """Returns the credentials for a new channel."""
        return self._credentials.get()


@dataclass(frozen=True, slots=True)
class _ServerPems:
    chain: bytes
    key: bytes
    client_ca: bytes | None

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.chain)], self.client_ca)


class ServerTls:
    """A server's certificate, and the authorities whose clients it accepts if any are given."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        """Reads the files. Raises TlsError."""
        self._cert, self._key, self._client_ca = cert, key, client_ca
        files = (cert, key) if client_ca is None else (cert, key, client_ca)
        self._pems = Reloading(files, self._load)

    def credentials(self) -> grpc.ServerCredentials:
        """Returns the credentials of one server; each new connection gets the newest files."""
        # Of this server alone: every server has to be told of a change.
        in_use = self._pems.get()

        def changed_configuration() -> grpc.ServerCertificateConfiguration | None:
            """Called by gRPC before a handshake; None leaves everything as it is.

            A configuration cannot be returned twice: gRPC takes it away from its Python object.
            """
            nonlocal in_use
            newest = self._pems.get()
            if newest is in_use:
                return None
            in_use = newest
            return newest.configuration()

        return grpc.dynamic_ssl_server_credentials(
            in_use.configuration(),
            # The type stubs leave out that it may return None.
            cast(Callable[[], grpc.ServerCertificateConfiguration], changed_configuration),
            require_client_authentication=self._client_ca is not None,
        )

    def _load(self) -> _ServerPems:
        chain, key = read_identity(self._cert, self._key)
        return _ServerPems(
            chain, key, None if self._client_ca is None else read_authorities(self._client_ca)
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"cannot read {path}: {error.strerror}") from error


def _check_identity(cert: Path, chain_pem: bytes, key: Path, key_pem: bytes) -> None:
    if b"-----BEGIN CERTIFICATE-----" not in chain_pem:
        raise TlsError(f"{cert} holds no PEM certificate")
    if b"PRIVATE KEY-----" not in key_pem:
        raise TlsError(f"{key} holds no PEM private key")
    if b"ENCRYPTED" in key_pem:
        raise TlsError(f"{key} is encrypted; give a key without a passphrase")
    # The ssl module reads files only, and the files may have changed since: check what was read.
    # An anonymous file keeps the key off every disk.
    with _anonymous_file(chain_pem) as chain_path, _anonymous_file(key_pem) as key_path:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(chain_path, key_path)
        except ssl.SSLError as error:
            if error.reason == "KEY_VALUES_MISMATCH":
                problem = f"the key in {key} does not match the certificate in {cert}"
            else:
                problem = f"{cert} or {key} is damaged: {error.reason}"
            raise TlsError(problem) from error


@contextmanager
def _anonymous_file(content: bytes) -> Iterator[str]:
    """A file in memory that has a path for as long as the block runs."""
    descriptor = os.memfd_create("tls")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
