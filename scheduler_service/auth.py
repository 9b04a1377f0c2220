"""Lets only calls with a bearer token through."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from scheduler_service.caller import authenticated_by_token
from scheduler_service.interception import Context, Continuation, refusal, within
from scheduler_service.tokens_file import TokensFile

_SCHEME = "bearer "


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a known token, before their request is read.

    Those let through run as the token's owner; see `caller_of`.
    """

    def __init__(self, tokens: TokensFile, open_services: Sequence[str]) -> None:
        """Calls of `open_services`, given by full name, need no token."""
        self._tokens = tokens
        self._open_prefixes = tuple(f"/{service}/" for service in open_services)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Checks the token of a call."""
        if handler_call_details.method.startswith(self._open_prefixes):
            return await continuation(handler_call_details)
        token = _token(handler_call_details.invocation_metadata)
        if token is None:
            return _unauthenticated("send a token in the header 'authorization: Bearer TOKEN'")
        name = self._tokens.name_of(token)
        if name is None:
            return _unauthenticated("this token is not known here")
        handler = await continuation(handler_call_details)
        return handler and within(handler, lambda context: _as_owner(name, context))


@asynccontextmanager
async def _as_owner(name: str, context: Context) -> AsyncIterator[None]:
    with authenticated_by_token(name):
        yield


def _token(metadata: Any) -> str | None:
    """The token of the one authorization header; two would be open to interpretation."""
    values = [value for key, value in metadata or () if key == "authorization"]
    if len(values) != 1 or not isinstance(values[0], str):
        return None
    scheme, token = values[0][: len(_SCHEME)], values[0][len(_SCHEME) :]
    return token if scheme.lower() == _SCHEME and token else None


def _unauthenticated(message: str) -> Any:
    return refusal(grpc.StatusCode.UNAUTHENTICATED, message)
