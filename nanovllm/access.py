"""What a client is let in with: channels, encrypted or not, and its token."""

from dataclasses import dataclass, field

import grpc

from nanovllm.channel import channel_options, check_address, is_local
from nanovllm.tls import TlsConfig


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach servers and prove who one is. The token is not part of its repr."""

    token: str | None = field(default=None, repr=False)
    #: None: plaintext, unless `credentials` says otherwise.
    tls: TlsConfig | None = None
    #: Made by the caller, instead of `tls`.
    credentials: grpc.ChannelCredentials | None = None
    #: Whether the token may cross a network in plaintext.
    insecure: bool = False

    def __post_init__(self) -> None:
        if self.tls is not None and self.credentials is not None:
            raise ValueError("tls and credentials exclude each other; give one of them")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ValueError("a token has only printable ASCII characters")

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Headers of every call.

        Not call credentials: gRPC does not send those without TLS, not even over loopback.
        """
        return () if self.token is None else (("authorization", f"Bearer {self.token}"),)

    def channel(self, address: str) -> grpc.Channel:
        """Opens a channel. Raises ValueError or TlsError."""
        credentials, options = self._prepare(address)
        if credentials is None:
            return grpc.insecure_channel(address, options)
        return grpc.secure_channel(address, credentials, options)

    def aio_channel(self, address: str) -> grpc.aio.Channel:
        """Opens a channel for asyncio. Raises ValueError or TlsError."""
        credentials, options = self._prepare(address)
        if credentials is None:
            return grpc.aio.insecure_channel(address, options)
        return grpc.aio.secure_channel(address, credentials, options)

    def _prepare(
        self, address: str
    ) -> tuple[grpc.ChannelCredentials | None, list[tuple[str, int | str]]]:
        options = channel_options(check_address(address))
        if self.tls is not None:
            return self.tls.credentials(), [*options, *self.tls.options()]
        if self.credentials is None and self.token and not (self.insecure or is_local(address)):
            raise ValueError(
                f"the token would cross the network to {address} in plaintext; give tls, or allow "
                "it with insecure"
            )
        return self.credentials, options
