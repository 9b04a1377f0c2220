"""The admin service: looks into the engine and steers it. Translates, and nothing else."""

import logging
import time
from collections.abc import Callable, Iterator

import grpc

from nanovllm.logs import fields
from nanovllm.service_settings import StartupError
from nanovllm.v1 import admin_pb2, admin_pb2_grpc
from scheduler_service.access.interception import Context
from scheduler_service.access.security import check_executor_exposure
from scheduler_service.engine import Engine
from scheduler_service.executors.description import ExecutorDescription
from scheduler_service.executors.pool import (
    ExecutorChangeError,
    ExecutorKnownError,
    ExecutorPool,
    LastExecutorError,
    UnknownExecutorError,
)
from scheduler_service.live_request import LiveRequest
from scheduler_service.reservation import Reservation
from scheduler_service.sequence import SequenceStatus
from scheduler_service.serving_state import ServingState
from scheduler_service.settings import SchedulerSettings, check_executor_address

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
_CHANGE_CODES: dict[type[ExecutorChangeError], grpc.StatusCode] = {
    ExecutorKnownError: grpc.StatusCode.ALREADY_EXISTS,
    UnknownExecutorError: grpc.StatusCode.NOT_FOUND,
    LastExecutorError: grpc.StatusCode.FAILED_PRECONDITION,
}


class AdminServicer(admin_pb2_grpc.AdminServiceServicer):
    """nanovllm.v1.AdminService."""

    def __init__(self, engine: Engine, serving: ServingState, settings: SchedulerSettings) -> None:
        self._engine = engine
        self._serving = serving
        # They say how executors are protected; those that join later are no exception.
        self._settings = settings

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

    async def ListExecutors(  # noqa: N802
        self, request: admin_pb2.ListExecutorsRequest, context: Context
    ) -> admin_pb2.ListExecutorsResponse:
        """Describes the executors."""
        executors = self._engine.pool.executors()
        return admin_pb2.ListExecutorsResponse(executors=map(_executor, executors))

    async def AddExecutor(  # noqa: N802
        self, request: admin_pb2.AddExecutorRequest, context: Context
    ) -> admin_pb2.AddExecutorResponse:
        """Has an executor join."""
        pool = self._engine.pool
        try:
            address = check_executor_address(request.address)
            check_executor_exposure(address, self._settings)
        except (ValueError, StartupError) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"address: {error}")
        await self._change(context, pool.add_executor, address)
        logger.info("an administrator added an executor", extra=fields(executor=address))
        return admin_pb2.AddExecutorResponse()

    async def RemoveExecutor(  # noqa: N802
        self, request: admin_pb2.RemoveExecutorRequest, context: Context
    ) -> admin_pb2.RemoveExecutorResponse:
        """Has an executor leave."""
        pool, address = self._engine.pool, request.address
        num_interrupted = _num_running(pool, address)
        await self._change(context, pool.remove_executor, address)
        logger.info(
            "an administrator removed an executor",
            extra=fields(executor=address, num_interrupted=num_interrupted),
        )
        return admin_pb2.RemoveExecutorResponse(num_interrupted=num_interrupted)

    async def DrainExecutor(  # noqa: N802
        self, request: admin_pb2.DrainExecutorRequest, context: Context
    ) -> admin_pb2.DrainExecutorResponse:
        """Sends an executor nothing new."""
        pool, address = self._engine.pool, request.address
        await self._change(context, pool.drain_executor, address)
        logger.info("an administrator drains an executor", extra=fields(executor=address))
        return admin_pb2.DrainExecutorResponse(num_running=_num_running(pool, address))

    async def UndrainExecutor(  # noqa: N802
        self, request: admin_pb2.UndrainExecutorRequest, context: Context
    ) -> admin_pb2.UndrainExecutorResponse:
        """Sends an executor requests again."""
        await self._change(context, self._engine.pool.undrain_executor, request.address)
        logger.info(
            "an administrator ended the drain of an executor",
            extra=fields(executor=request.address),
        )
        return admin_pb2.UndrainExecutorResponse()

    @staticmethod
    async def _change(context: Context, change: Callable[[str], object], address: str) -> None:
        try:
            change(address)
        except ExecutorChangeError as error:
            await context.abort(_CHANGE_CODES[type(error)], str(error))

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


def _executor(executor: ExecutorDescription) -> admin_pb2.ExecutorStatus:
    return admin_pb2.ExecutorStatus(
        summary=executor.summary(),
        connected=executor.is_connected,
        draining=executor.is_draining,
        problem=executor.problem or "",
        num_kv_blocks=executor.num_kv_blocks,
        num_free_kv_blocks=executor.num_free_kv_blocks,
        num_cached_kv_blocks=executor.num_cached_kv_blocks,
    )


def _num_running(pool: ExecutorPool, address: str) -> int:
    return sum(each.num_running for each in pool.executors() if each.address == address)
