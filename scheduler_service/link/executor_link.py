"""The scheduler's end of the executor protocol: sessions, plans down, results up, reconnection."""

import asyncio
import contextlib
import logging
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias, cast

import grpc

from nanovllm.channel import EXECUTOR_CHANNEL_OPTIONS
from nanovllm.logs import fields
from nanovllm.tls import ClientTls
from nanovllm.v1 import executor_pb2, executor_pb2_grpc
from nanovllm.wire import WireError
from scheduler_service.executors.connection import Connection
from scheduler_service.link.executor_liveness import ExecutorLiveness, LivenessLimits
from scheduler_service.link.result_order import ResultOrder, ResultOrderError
from scheduler_service.link.round_trips import RoundTrips
from scheduler_service.link.session_end import SessionEnd
from scheduler_service.model_spec import ModelSpec
from scheduler_service.plan import Plan, decode_step_result, encode_plan
from scheduler_service.scheduler import ExecutorCapacity, ExecutorProtocolError
from scheduler_service.telemetry.metrics.link_counts import LinkCounts

logger = logging.getLogger(__name__)

_MIN_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 0.5
_CALL_TIMEOUT_S = 5.0
# Messages with results that the executor may have sent and this process has not taken in. Every
# second one is acknowledged: two on their way keep results coming while one is taken in.
_MAX_MESSAGES_IN_FLIGHT = 4
_MESSAGES_PER_ACKNOWLEDGEMENT = 2


ExecuteCall: TypeAlias = grpc.aio.StreamStreamCall
# Told whether the executor is there, on every change.
StateListener: TypeAlias = Callable[[bool], Awaitable[None]]


# Status codes with which an executor says why it ended the session.
_END_REASONS = {
    grpc.StatusCode.ABORTED: SessionEnd.FENCED,
    grpc.StatusCode.INVALID_ARGUMENT: SessionEnd.PROTOCOL,
    grpc.StatusCode.FAILED_PRECONDITION: SessionEnd.REFUSED,
}


class SessionEndedError(Exception):
    """The session is over, or did not come about; the message says why."""

    def __init__(self, message: str, reason: SessionEnd) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What every executor has to serve, how long it may be silent, and how it is reached."""

    model: ModelSpec
    liveness: LivenessLimits
    # None: plaintext.
    tls: ClientTls | None = None


class ExecutorLink:
    """Keeps one session with one executor open for as long as it runs."""

    def __init__(
        self,
        connection: Connection,
        settings: LinkSettings,
        counts: LinkCounts,
        on_change: StateListener,
    ) -> None:
        self._connection = connection
        self._settings = settings
        self._counts = counts
        self._on_change = on_change
        self._outbox: deque[Plan] = deque()
        self._outbox_filled = asyncio.Event()
        # Messages with results in this session.
        self._num_messages_taken = 0
        self._num_messages_acknowledged = 0
        # Taking the executor back from the scheduler that took it would never end.
        self._is_fenced = False
        # Of the problem that was logged last: the same one at every attempt is logged once.
        self._last_kind: object = None

    @property
    def address(self) -> str:
        """Address of the executor."""
        return self._connection.address

    async def run(self) -> None:
        """Opens session after session until cancelled."""
        backoff_s = _MIN_BACKOFF_S
        while True:
            had_session = False
            try:
                await self._run_session()
            except Exception as error:
                had_session = self._connection.has_session
                self._connection.on_disconnected(self._report(error))
            finally:
                await self._on_change(False)
            backoff_s = _MIN_BACKOFF_S if had_session else min(2 * backoff_s, _MAX_BACKOFF_S)
            # Jitter keeps several schedulers from knocking at the same moment.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    def _report(self, error: Exception) -> str:
        """Logs and counts why there is no session; returns what clients may be told."""
        if not isinstance(error, SessionEndedError | grpc.aio.AioRpcError):
            # A bug that one session or one request brings out must not end the service.
            self._counts.sessions_ended[SessionEnd.BUG] += 1
            public_problem = "the scheduler failed in a session"
            self._last_kind = problem = f"{public_problem}: {error!r}"
            logger.exception("session failed", extra=fields(executor=self.address, problem=problem))
            return public_problem
        if isinstance(error, SessionEndedError):
            self._is_fenced = self._is_fenced or error.reason is SessionEnd.FENCED
            self._counts.sessions_ended[error.reason] += 1
        problem = self._describe(error)
        # gRPC words one and the same absence in several ways.
        kind = error.code() if isinstance(error, grpc.aio.AioRpcError) else problem
        if self._connection.has_session or kind != self._last_kind:
            logger.warning(
                "executor unavailable", extra=fields(executor=self.address, problem=problem)
            )
        self._last_kind = kind
        return _public(error)

    async def _run_session(self) -> None:
        async with self._channel() as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            info = await stub.GetExecutorInfo(
                executor_pb2.GetExecutorInfoRequest(), timeout=_CALL_TIMEOUT_S
            )
            self._check_model(info)
            if self._is_fenced and info.has_session:
                raise SessionEndedError(
                    "another scheduler has taken it over; this one waits until that one is gone",
                    SessionEnd.REFUSED,
                )
            self._is_fenced = False
            call = stub.Execute()
            try:
                await self._start(call, info.epoch)
                await self._converse(call, info)
            except grpc.aio.AioRpcError as error:
                raise _ended(error.code(), error.details()) from error
            finally:
                call.cancel()

    def _channel(self) -> grpc.aio.Channel:
        tls = self._settings.tls
        if tls is None:
            return grpc.aio.insecure_channel(self.address, options=EXECUTOR_CHANNEL_OPTIONS)
        options = [*EXECUTOR_CHANNEL_OPTIONS, *tls.options]
        return grpc.aio.secure_channel(self.address, tls.credentials(), options=options)

    def _check_model(self, info: executor_pb2.GetExecutorInfoResponse) -> None:
        model = self._settings.model
        if info.model_fingerprint != model.fingerprint:
            raise SessionEndedError(
                f"it serves another model (fingerprint {info.model_fingerprint[:12]}, this "
                f"scheduler serves {model.name!r}, fingerprint {model.fingerprint[:12]}); start "
                "both services with the same --model",
                SessionEnd.REFUSED,
            )

    async def _start(self, call: ExecuteCall, epoch: int) -> None:
        start = executor_pb2.StartSession(
            expected_epoch=epoch,
            session_id=secrets.randbits(64),
            heartbeat_interval_ms=max(1, int(self._settings.liveness.heartbeat_interval_s * 1000)),
            max_messages_in_flight=_MAX_MESSAGES_IN_FLIGHT,
        )
        async with _limit(_CALL_TIMEOUT_S, "did not answer StartSession"):
            await _write(call, executor_pb2.ExecuteRequest(start_session=start))
            answer = await _read(call)
        if answer is None or not answer.HasField("session_started"):
            raise SessionEndedError(
                "did not answer StartSession with SessionStarted", SessionEnd.REFUSED
            )
        started = answer.session_started
        if (started.epoch, started.session_id) != (epoch, start.session_id):
            raise SessionEndedError("answered StartSession for another session", SessionEnd.REFUSED)

    async def _converse(
        self, call: ExecuteCall, info: executor_pb2.GetExecutorInfoResponse
    ) -> None:
        self._outbox.clear()
        self._num_messages_taken = self._num_messages_acknowledged = 0
        liveness = ExecutorLiveness(self._settings.liveness, time.monotonic())
        trips = RoundTrips(self._counts.round_trip.observe)
        self._connection.on_connected(info, _capacity(info), self._send)
        await self._on_change(True)
        logger.info(
            "executor connected",
            extra=fields(
                executor=self.address,
                epoch=str(info.epoch),
                num_blocks=info.num_blocks,
                block_size=info.block_size,
                max_num_seqs=info.max_num_seqs,
                dtype=info.dtype,
                device=info.device,
            ),
        )
        tasks = [
            asyncio.create_task(self._read_results(call, liveness, trips), name="read results"),
            asyncio.create_task(self._write_plans(call, trips), name="write plans"),
            asyncio.create_task(self._watch(liveness), name="watch executor"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _send(self, plan: Plan) -> None:
        self._outbox.append(plan)
        self._outbox_filled.set()

    async def _write_plans(self, call: ExecuteCall, trips: RoundTrips) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox or self._owes_acknowledgement:
                request = executor_pb2.ExecuteRequest(num_messages_taken=self._num_messages_taken)
                self._num_messages_acknowledged = self._num_messages_taken
                if self._outbox:
                    request.plan.CopyFrom(encode_plan(self._outbox.popleft()))
                    self._counts.num_plans += 1
                    trips.sent(request.plan.step_id, time.monotonic())
                await _write(call, request)

    @property
    def _owes_acknowledgement(self) -> bool:
        num_taken = self._num_messages_taken - self._num_messages_acknowledged
        return num_taken >= _MESSAGES_PER_ACKNOWLEDGEMENT

    async def _read_results(
        self, call: ExecuteCall, liveness: ExecutorLiveness, trips: RoundTrips
    ) -> None:
        order = ResultOrder()
        while True:
            message = await _read(call)
            if message is None:
                raise await _end_of(call)
            if message.HasField("heartbeat"):
                liveness.on_heartbeat(message.heartbeat.num_iterations, time.monotonic())
                continue
            now_s = time.monotonic()
            liveness.on_results(now_s)
            try:
                results = [decode_step_result(result) for result in message.step_results.results]
                for result in results:
                    order.check(result)
                    trips.acknowledged(result.applied_step_id, now_s)
                self._connection.on_results(results)
                self._num_messages_taken += 1
                if self._owes_acknowledgement:
                    self._outbox_filled.set()
            except (WireError, ResultOrderError, ExecutorProtocolError) as error:
                raise SessionEndedError(
                    f"broke the protocol: {error}", SessionEnd.PROTOCOL
                ) from error

    async def _watch(self, liveness: ExecutorLiveness) -> None:
        while True:
            await asyncio.sleep(self._settings.liveness.check_interval_s)
            now_s = time.monotonic()
            problem = liveness.problem(has_work=self._connection.has_work_in_flight, now_s=now_s)
            if problem is not None:
                raise SessionEndedError(problem, SessionEnd.STALLED)
            self._connection.on_suspicion(liveness.is_suspect(now_s))

    @staticmethod
    def _describe(error: Exception) -> str:
        if isinstance(error, grpc.aio.AioRpcError):
            return f"{error.code().name}: {error.details()}"
        return str(error)


def _public(error: SessionEndedError | grpc.aio.AioRpcError) -> str:
    """What clients may be told: not what gRPC says, which names addresses and socket files."""
    if isinstance(error, SessionEndedError) and error.reason is not SessionEnd.LOST:
        return str(error)
    return "it cannot be reached or ended its session"


def _capacity(info: executor_pb2.GetExecutorInfoResponse) -> ExecutorCapacity:
    sizes = ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len")
    for name in sizes:
        if getattr(info, name) < 1:
            raise SessionEndedError(
                f"claims a {name} of {getattr(info, name)}", SessionEnd.PROTOCOL
            )
    return ExecutorCapacity(
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        executor_epoch=info.epoch,
    )


async def _write(call: ExecuteCall, request: executor_pb2.ExecuteRequest) -> None:
    try:
        await call.write(request)
    except asyncio.InvalidStateError:
        # gRPC refuses to write to a call that ended meanwhile; its status says why it did.
        raise await _end_of(call) from None


async def _read(call: ExecuteCall) -> executor_pb2.ExecuteResponse | None:
    """The next message, or None at the end of the stream."""
    message = await call.read()
    return None if message is grpc.aio.EOF else cast(executor_pb2.ExecuteResponse, message)


async def _end_of(call: ExecuteCall) -> SessionEndedError:
    return _ended(await call.code(), await call.details())


def _ended(code: grpc.StatusCode, details: str | None) -> SessionEndedError:
    reason = _END_REASONS.get(code, SessionEnd.LOST)
    return SessionEndedError(f"ended the session: {code.name}: {details}", reason)


@contextlib.asynccontextmanager
async def _limit(timeout_s: float, problem: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise SessionEndedError(f"{problem} within {timeout_s:g} s", SessionEnd.REFUSED) from error
