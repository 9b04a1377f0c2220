"""Lets only calls with a bearer token through."""

import logging
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc

from nanovllm.logs import fields
from scheduler_service.access.caller import authenticated_by_token, caller_of
from scheduler_service.access.interception import Context, Continuation, refusal, within
from scheduler_service.access.tokens_file import TokensFile
from scheduler_service.telemetry.log_budget import LogBudget

logger = logging.getLogger(__name__)

_SCHEME = "bearer "
_MAX_LINES_PER_S = 10
# A caller may ask for anything.
_MAX_METHOD_CHARS = 128


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a known token, before their request is read.

    Those let through run as the token's owner; see `caller_of`.
    """

    def __init__(self, tokens: TokensFile, open_services: Sequence[str]) -> None:
        """Calls of `open_services`, given by full name, need no token."""
        self._tokens = tokens
        self._budget = LogBudget(_MAX_LINES_PER_S, _write_rest)
        self._open_prefixes = tuple(f"/{service}/" for service in open_services)

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Checks the token of a call."""
        if handler_call_details.method.startswith(self._open_prefixes):
            return await continuation(handler_call_details)
        method = handler_call_details.method
        token = _token(handler_call_details.invocation_metadata)
        if token is None:
            message = "send a token in the header 'authorization: Bearer TOKEN'"
            return self._refusal(message, "no_token", method)
        name = self._tokens.name_of(token)
        if name is None:
            return self._refusal("this token is not known here", "unknown_token", method)
        handler = await continuation(handler_call_details)
        return handler and within(handler, lambda context: _as_owner(name, context))

    def _refusal(self, message: str, reason: str, method: str) -> Any:
        return within(
            refusal(grpc.StatusCode.UNAUTHENTICATED, message),
            lambda context: self._logged(context, reason, method),
        )

    @asynccontextmanager
    async def _logged(self, context: Context, reason: str, method: str) -> AsyncIterator[None]:
        if self._budget.allows(reason):
            logger.warning(
                "call without a known token",
                extra=fields(
                    caller=caller_of(context).name,
                    reason=reason,
                    method=method[:_MAX_METHOD_CHARS],
                ),
            )
        yield


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


def _write_rest(left_out: Counter[str]) -> None:
    logger.warning("more calls without a known token", extra=fields(**left_out))
