"""Runs something around the handler of every call, whatever kind of handler it is."""

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, TypeAlias

import grpc

from nanovllm.logs import fields

logger = logging.getLogger(__name__)

Context: TypeAlias = grpc.aio.ServicerContext
#: Entered before a handler runs and left after it, with the handler's exception if there was one.
Scope: TypeAlias = Callable[[Context], AbstractAsyncContextManager[None]]
Continuation: TypeAlias = Callable[
    [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler | None]
]

# Stands for a request that could not be parsed, until somebody can answer the call.
_MALFORMED = object()


class ErrorGuard(grpc.aio.ServerInterceptor):
    """Keeps what an unexpected exception says from clients: they get a reference, the log the rest.

    gRPC by itself would send the exception's text. First in the list of interceptors.
    """

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Wraps the handler."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        return handler and within(handler, lambda context: _answering_errors(method, context))


@asynccontextmanager
async def _answering_errors(method: str, context: Context) -> AsyncIterator[None]:
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except Exception:
        await end_call(context, grpc.StatusCode.INTERNAL, log_failure(method))


def log_failure(method: str) -> str:
    """Logs the exception that is being handled; returns what the client is told instead."""
    reference = secrets.token_hex(4)
    logger.exception("call failed", extra=fields(method=method, reference=reference))
    return f"the server failed; its log says more under the reference {reference}"


def within(handler: Any, scope: Scope) -> Any:
    """Returns a method handler like `handler` that runs inside a scope.

    A request that is no valid message ends its call with INVALID_ARGUMENT.
    """
    make, name = _KINDS[handler.request_streaming, handler.response_streaming]
    behaviour = getattr(handler, name)
    deserialize = handler.request_deserializer
    if deserialize is not None:
        deserialize = _marking(deserialize)

    async def respond(request: Any, context: Context) -> Any:
        async with scope(context):
            if handler.request_streaming:
                answer = behaviour(_checked(request, context), context)
            else:
                await _check_request(request, context)
                answer = behaviour(request, context)
            if not hasattr(answer, "__aiter__"):
                return await answer  # one response, or a stream that the handler writes itself
            async for response in answer:
                await context.write(response)
            return None

    return make(respond, deserialize, handler.response_serializer)


async def end_call(context: Context, code: grpc.StatusCode, message: str) -> None:
    """Ends a call with a status; does nothing if it ended by itself meanwhile."""
    try:
        await context.abort(code, message)
    except grpc.aio.InternalError:
        logger.debug("a call was over before it could be told", extra=fields(status=message))


def refusal(code: grpc.StatusCode, message: str) -> Any:
    """Returns a handler, for calls of every kind, that ends them before a request is read."""

    async def refuse(requests: Any, context: Context) -> None:
        await end_call(context, code, message)

    return grpc.stream_stream_rpc_method_handler(refuse)


# By whether requests and responses are streamed.
_KINDS = {
    (False, False): (grpc.unary_unary_rpc_method_handler, "unary_unary"),
    (False, True): (grpc.unary_stream_rpc_method_handler, "unary_stream"),
    (True, False): (grpc.stream_unary_rpc_method_handler, "stream_unary"),
    (True, True): (grpc.stream_stream_rpc_method_handler, "stream_stream"),
}


def _marking(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def deserialize_or_mark(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:
            # gRPC would answer UNKNOWN with the exception's text.
            return _MALFORMED

    return deserialize_or_mark


async def _checked(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
    async for request in requests:
        await _check_request(request, context)
        yield request


async def _check_request(request: Any, context: Context) -> None:
    if request is _MALFORMED:
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, "the request is no valid message of this method"
        )
