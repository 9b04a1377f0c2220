"""The admin service: looks into the engine and steers it. Translates, and nothing else."""

import logging
import time
from collections.abc import Iterator

import grpc

from nanovllm.logs import fields
from nanovllm.v1 import admin_pb2, admin_pb2_grpc
from scheduler_service.access.interception import Context
from scheduler_service.engine import Engine
from scheduler_service.live_request import LiveRequest
from scheduler_service.reservation import Reservation
from scheduler_service.sequence import SequenceStatus
from scheduler_service.serving_state import ServingState

logger = logging.getLogger(__name__)

_STATES = {
    SequenceStatus.WAITING: admin_pb2.SEQUENCE_STATE_WAITING,
    SequenceStatus.PREFILLING: admin_pb2.SEQUENCE_STATE_PREFILLING,
    SequenceStatus.DECODING: admin_pb2.SEQUENCE_STATE_DECODING,
    SequenceStatus.FINISHED: admin_pb2.SEQUENCE_STATE_FINISHED,
}
_LEVELS = {
    admin_pb2.LOG_LEVEL_DEBUG: logging.DEBUG,
    admin_pb2.LOG_LEVEL_INFO: logging.INFO,
    admin_pb2.LOG_LEVEL_WARNING: logging.WARNING,
    admin_pb2.LOG_LEVEL_ERROR: logging.ERROR,
}


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """nanovllm.v1.AdminService."""

    def __init__(self, engine: Engine, serving: ServingState) -> None:
        self._engine = engine
        self._serving = serving

    async def GetState(  # noqa: N802
        self, request: admin_pb2.GetStateRequest, context: Context
    ) -> admin_pb2.GetStateResponse:
        """Describes the live requests."""
        now_s = time.monotonic()
        requests = [
            *(_tokenizing(item, now_s) for item in self._engine.reservations()),
            *(_live(item, now_s) for item in self._engine.live_requests()),
        ]
        requests.sort(key=lambda message: -message.age_s)
        return admin_pb2.GetStateResponse(requests=requests, draining=self._serving.is_draining)

    async def AbortRequests(  # noqa: N802
        self, request: admin_pb2.AbortRequestsRequest, context: Context
    ) -> admin_pb2.AbortRequestsResponse:
        """Ends requests of any caller."""
        if not request.request_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "request_id: must not be empty")
        keys = [
            item.key
            for item in self._all()
            if item.key.request_id == request.request_id
            and request.caller in ("", item.ticket.client)
        ]
        num_aborted = sum(self._engine.abort(key.request_id, key.owner) for key in keys)
        logger.info("an administrator ended requests", extra=fields(count=num_aborted))
        return admin_pb2.AbortRequestsResponse(num_aborted=num_aborted)

    async def Drain(  # noqa: N802
        self, request: admin_pb2.DrainRequest, context: Context
    ) -> admin_pb2.DrainResponse:
        """Refuses new requests."""
        await self._serving.set_draining(True)
        logger.info("an administrator asked to drain: new requests are refused")
        return admin_pb2.DrainResponse(num_live=sum(1 for _ in self._all()))

    async def Undrain(  # noqa: N802
        self, request: admin_pb2.UndrainRequest, context: Context
    ) -> admin_pb2.UndrainResponse:
        """Takes new requests again."""
        await self._serving.set_draining(False)
        logger.info("an administrator ended the drain: new requests are taken")
        return admin_pb2.UndrainResponse()

    async def FlushPrefixCache(  # noqa: N802
        self, request: admin_pb2.FlushPrefixCacheRequest, context: Context
    ) -> admin_pb2.FlushPrefixCacheResponse:
        """Forgets cached prefixes."""
        num_freed = self._engine.flush_prefix_cache()
        logger.info("an administrator flushed the prefix cache", extra=fields(num_blocks=num_freed))
        return admin_pb2.FlushPrefixCacheResponse(num_freed_kv_blocks=num_freed)

    async def SetLogLevel(  # noqa: N802
        self, request: admin_pb2.SetLogLevelRequest, context: Context
    ) -> admin_pb2.SetLogLevelResponse:
        """Changes the log level of the process."""
        if request.level not in _LEVELS:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "level: give one of the levels")
        root = logging.getLogger()
        previous = next(
            (proto for proto, level in _LEVELS.items() if level >= root.level),
            admin_pb2.LOG_LEVEL_ERROR,
        )
        root.setLevel(_LEVELS[request.level])
        return admin_pb2.SetLogLevelResponse(previous_level=previous)

    def _all(self) -> Iterator[LiveRequest | Reservation]:
        yield from self._engine.reservations()
        yield from self._engine.live_requests()


def _tokenizing(reservation: Reservation, now_s: float) -> admin_pb2.LiveRequest:
    return admin_pb2.LiveRequest(
        request_id=reservation.key.request_id,
        caller=reservation.ticket.client,
        age_s=now_s - reservation.arrival_s,
    )


def _live(request: LiveRequest, now_s: float) -> admin_pb2.LiveRequest:
    return admin_pb2.LiveRequest(
        request_id=request.key.request_id,
        caller=request.ticket.client,
        age_s=now_s - request.completions[0].seq.arrival_s,
        sequences=[
            admin_pb2.LiveSequence(
                index=completion.index,
                state=_STATES[completion.seq.status],
                prompt_tokens=completion.seq.num_prompt_tokens,
                output_tokens=completion.seq.num_output_tokens,
                preemptions=completion.seq.num_preemptions,
            )
            for completion in request.completions
        ],
    )
