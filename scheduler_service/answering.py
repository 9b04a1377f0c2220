"""How calls are answered: messages, and the statuses of errors."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc

from nanovllm.logs import fields
from scheduler_service.errors import RequestError, SlowReaderError, to_status

logger = logging.getLogger(__name__)

# How long the status of an error may take to get out before nobody waits for that any more.
_STATUS_WRITE_S = 1.0

Context: TypeAlias = grpc.aio.ServicerContext
T = TypeVar("T")


async def write(context: Context, response: Any, timeout_s: float) -> None:
    """Returns once the transport has room for more. Raises SlowReaderError.

    Meanwhile the request goes on and its deltas grow together; nobody else waits.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(response)
    except TimeoutError as error:
        raise SlowReaderError(
            f"the client read nothing for {timeout_s:g} s; read faster, or ask for less"
        ) from error
    except grpc.aio.InternalError as error:
        # gRPC cannot write to a call that is over; it is about to cancel this task.
        raise asyncio.CancelledError("the client is gone") from error


async def reply(context: Context, answer: Callable[[], Awaitable[T]]) -> T:
    """Answers a unary call, or ends it with the status of a RequestError."""
    try:
        return await answer()
    except RequestError as error:
        await fail(context, error)
        raise  # not reached unless nobody waits for the answer any more


async def fail(context: Context, error: RequestError) -> None:
    """Ends a call with the status of an error."""
    try:
        # A client that reads nothing gets the status behind everything else, whenever it does.
        async with asyncio.timeout(_STATUS_WRITE_S):
            await context.abort_with_status(to_status(error))
    except TimeoutError:
        logger.debug("a call ends before its client knows", extra=fields(reason=error.label))
    except grpc.aio.InternalError:
        # The call ended by itself at this moment: its deadline passed here and there at once.
        logger.debug("a call was over before it could be told", extra=fields(reason=error.label))
