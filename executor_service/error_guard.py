"""Keeps what unexpected exceptions say on this machine: peers get a reference, the log the rest."""

import logging
import secrets
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from nanovllm.logs import fields

logger = logging.getLogger(__name__)

_MAKERS = {
    "unary_unary": grpc.unary_unary_rpc_method_handler,
    "unary_stream": grpc.unary_stream_rpc_method_handler,
    "stream_unary": grpc.stream_unary_rpc_method_handler,
    "stream_stream": grpc.stream_stream_rpc_method_handler,
}


class ErrorGuard(grpc.ServerInterceptor):
    """Answers unexpected exceptions with INTERNAL; gRPC itself would send the exception's text."""

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wraps the handler."""
        handler: Any = continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        kind = (
            f"{'stream' if handler.request_streaming else 'unary'}_"
            f"{'stream' if handler.response_streaming else 'unary'}"
        )
        wrap = _guarded_stream if handler.response_streaming else _guarded
        return _MAKERS[kind](
            wrap(method, getattr(handler, kind)),
            handler.request_deserializer,
            handler.response_serializer,
        )


def _guarded(method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
    def respond(request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return behaviour(request, context)
        except Exception as error:
            _answer(method, context, error)
            raise

    return respond


def _guarded_stream(method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
    def respond(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        try:
            yield from behaviour(request, context)
        except Exception as error:
            _answer(method, context, error)
            raise

    return respond


def _answer(method: str, context: Any, error: Exception) -> None:
    """Ends the call, unless its handler or the peer has ended it."""
    if context.code() is not None:
        return
    # What reading the next request raises once the peer has cancelled; gRPC knows what it is.
    if isinstance(error, grpc.RpcError) and not context.is_active():
        return
    reference = secrets.token_hex(4)
    logger.exception("call failed", extra=fields(method=method, reference=reference))
    context.abort(
        grpc.StatusCode.INTERNAL,
        f"the executor failed; its log says more under the reference {reference}",
    )
