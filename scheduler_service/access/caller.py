"""Who makes a call: the name of its token, of its certificate, or where it comes from.

Token, certificate and address names cannot be mistaken for each other: the first two have a prefix
that no address has.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from urllib.parse import unquote

import grpc


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever makes a call."""

    name: str
    # Whether a token or a client certificate proves the name.
    is_authenticated: bool = False


# Set around the handler of a call whose token was checked, in the task that runs the handler.
_token_caller: ContextVar[Caller | None] = ContextVar("token_caller", default=None)


@contextmanager
def authenticated_by_token(token_name: str) -> Iterator[None]:
    """Makes `caller_of` return the owner of a token inside the block."""
    reset = _token_caller.set(Caller(f"token:{token_name}", is_authenticated=True))
    try:
        yield
    finally:
        _token_caller.reset(reset)


def caller_of(context: grpc.aio.ServicerContext) -> Caller:
    """Returns who makes the call that this task handles."""
    caller = _token_caller.get()
    if caller is not None:
        return caller
    certificate = _certificate_name(context.auth_context())
    if certificate is not None:
        return Caller(f"certificate:{certificate}", is_authenticated=True)
    return Caller(_host_of(context.peer()))


def _certificate_name(auth_context: Mapping[str, Iterable[bytes]]) -> str | None:
    """The identity of a verified client certificate: its alternative names, else its subject."""
    for key in ("x509_subject_alternative_name", "x509_subject", "x509_common_name"):
        values = sorted(value.decode(errors="replace") for value in auth_context.get(key, ()))
        if values:
            return ",".join(values)
    return None


def _host_of(peer: str) -> str:
    """The host of gRPC's peer string, such as "ipv4:10.0.0.5:41000" or "ipv6:%5B::1%5D:41000"."""
    kind, _, rest = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind
    host, _, _ = unquote(rest).rpartition(":")
    return host.strip("[]")
