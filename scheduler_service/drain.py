"""The end of a scheduler: what runs may finish, what cannot is told where it stands."""

import asyncio
import logging

import grpc

from nanovllm.logs import fields
from scheduler_service.engine import Engine
from scheduler_service.errors import ShuttingDownError

logger = logging.getLogger(__name__)

# For calls whose answer is made already, or will be in a moment.
_LAST_WRITES_S = 1.0
# What clients should wait before they come back: a successor starts in seconds.
_RETRY_AFTER_S = 1.0


async def drain(server: grpc.aio.Server, engine: Engine, timeout_s: float) -> None:
    """Refuses new requests, lets live ones go on for `timeout_s`, then ends them and the server.

    The server answers meanwhile, so that clients hear why and when to come back. A call without an
    end, as a watcher of the health service makes, is not waited for.
    """
    engine.refuse_new(
        ShuttingDownError("the server is shutting down; try again, or another one", _RETRY_AFTER_S)
    )
    try:
        async with asyncio.timeout(timeout_s):
            await engine.wait_until_idle()
    except TimeoutError:
        logger.warning("some requests did not end in time", extra=fields(limit_s=timeout_s))
        engine.fail_all(
            ShuttingDownError(
                "the server shut down before the request ended; it can be resumed", _RETRY_AFTER_S
            )
        )
    await server.stop(_LAST_WRITES_S)
