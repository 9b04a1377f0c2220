"""Where a load run sends its requests, and the scheduler as such a place."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import grpc

from nanovllm.aio import AsyncClient
from nanovllm.errors import NanovllmError
from nanovllm.load.requests import LoadRequest
from nanovllm.load.timing import RequestFailure
from nanovllm.outputs import FinishReason, Usage

#: Statuses by which a server turns a request down, if nothing of the answer has come yet.
_REFUSING_CODES = frozenset(
    {
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)


class RequestFailedError(Exception):
    """A request did not get its answer."""

    def __init__(self, code: str, message: str, *, is_refusal: bool = False) -> None:
        super().__init__(message)
        #: What goes into the request's timing.
        self.failure = RequestFailure(code, message, is_refusal)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer."""

    num_tokens: int
    #: Empty where the server does not say.
    token_ids: Sequence[int] = ()
    text: str = ""
    #: Set when the answer is complete.
    is_last: bool = False
    #: On one of the last pieces.
    usage: Usage | None = None


class Target(Protocol):
    """A place that answers requests."""

    def answer(self, request: LoadRequest) -> AsyncIterator[Piece]:
        """Sends a request and yields its answer as it comes.

        Iterating raises RequestFailedError where the answer does not come.
        """
        ...


class GrpcTarget:
    """A scheduler."""

    def __init__(self, client: AsyncClient, *, cache_salt: str = "") -> None:
        """Sends requests through a client; they share cached prefixes only with their own salt."""
        self._client = client
        self._cache_salt = cache_salt

    async def answer(self, request: LoadRequest) -> AsyncIterator[Piece]:
        """See `Target`."""
        has_begun = False
        try:
            async with self._client.stream(
                request.prompt, request.sampling_params, cache_salt=self._cache_salt
            ) as stream:
                async for delta in stream:
                    if delta.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                        raise RequestFailedError(
                            delta.finish_reason.name, f"the server ended it: {delta.finish_reason}"
                        )
                    has_begun = has_begun or bool(delta.token_ids)
                    yield Piece(
                        num_tokens=len(delta.token_ids),
                        token_ids=delta.token_ids,
                        text=delta.text,
                        is_last=delta.finish_reason is not None,
                        usage=delta.usage,
                    )
        except NanovllmError as error:
            raise RequestFailedError(
                error.code.name,
                f"{type(error).__name__}: {error}",
                is_refusal=not has_begun and error.code in _REFUSING_CODES,
            ) from error
