"""From settings to what protects the scheduler: TLS both ways, tokens, and who may listen where."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import grpc
from grpc_health.v1 import health_pb2

from nanovllm.service_settings import StartupError, check_exposure, server_tls
from nanovllm.tls import ClientTls, ServerTls, TlsConfig, TlsError
from scheduler_service.access.auth import TokenInterceptor
from scheduler_service.access.interception import ErrorGuard
from scheduler_service.access.tenancy import Tenancy
from scheduler_service.access.tokens_file import TokensFile, TokensFileError
from scheduler_service.settings import SchedulerSettings

# Supervisors and load balancers have no token.
_OPEN_SERVICES = (health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,)

Interceptors: TypeAlias = tuple[grpc.aio.ServerInterceptor, ...]


@dataclass(frozen=True, slots=True)
class Security:
    """What every server of this process gets."""

    tls: ServerTls | None
    executor_tls: ClientTls | None
    tenancy: Tenancy
    # In the order in which calls pass them.
    interceptors: Interceptors
    admin_interceptors: Interceptors

    @classmethod
    def of(cls, settings: SchedulerSettings) -> "Security":
        """Reads the files and refuses what would be open to strangers. Raises StartupError."""
        tls = server_tls(settings)
        check_exposure(
            settings.listen,
            settings,
            is_protected=tls is not None,
            remedy="give --tls-cert and --tls-key",
        )
        executor_tls = _executor_tls(settings)
        for address in settings.executor_addresses:
            check_executor_exposure(address, settings)
        tokens = _tokens("--auth-tokens-file", settings.auth_tokens_file)
        admin_tokens = _tokens("--admin-tokens-file", settings.admin_tokens_file)
        if settings.admin_listen is not None:
            check_exposure(
                settings.admin_listen,
                settings,
                is_protected=tls is not None and admin_tokens is not None,
                remedy="give --tls-cert, --tls-key and --admin-tokens-file",
            )
        return cls(
            tls,
            executor_tls,
            Tenancy(shared_prefix_cache=settings.shared_prefix_cache),
            _interceptors(tokens),
            _interceptors(admin_tokens),
        )


def check_executor_exposure(address: str, settings: SchedulerSettings) -> None:
    """Raises StartupError if traffic with an executor could be read by others."""
    check_exposure(
        address,
        settings,
        is_protected=settings.executor_tls_ca is not None,
        remedy="give --executor-tls-ca",
    )


def _executor_tls(settings: SchedulerSettings) -> ClientTls | None:
    if settings.executor_tls_ca is None:
        if settings.executor_tls_cert or settings.executor_tls_key:
            raise StartupError("--executor-tls-cert and --executor-tls-key need --executor-tls-ca")
        return None
    try:
        return ClientTls(
            TlsConfig(
                ca=settings.executor_tls_ca,
                cert=settings.executor_tls_cert,
                key=settings.executor_tls_key,
                server_name=settings.executor_tls_server_name,
            )
        )
    except TlsError as error:
        raise StartupError(f"--executor-tls-*: {error}") from error


def _interceptors(tokens: TokensFile | None) -> Interceptors:
    guard = ErrorGuard()
    return (guard,) if tokens is None else (guard, TokenInterceptor(tokens, _OPEN_SERVICES))


def _tokens(option: str, path: Path | None) -> TokensFile | None:
    if path is None:
        return None
    try:
        return TokensFile(path)
    except TokensFileError as error:
        raise StartupError(f"{option}: {error}") from error
