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
from nanovllm.v1 import executor_pb2, executor_pb2_grpc
from nanovllm.wire import WireError
from scheduler_service.engine import Engine
from scheduler_service.plan import Plan, decode_step_result, encode_plan
from scheduler_service.scheduler import ExecutorCapacity, ExecutorProtocolError

logger = logging.getLogger(__name__)

_MIN_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 2.0
_CALL_TIMEOUT_S = 5.0


ExecuteCall: TypeAlias = grpc.aio.StreamStreamCall
# Told whether the executor is there, on every change.
StateListener: TypeAlias = Callable[[bool], Awaitable[None]]


class SessionEndedError(Exception):
    """The session is over; the message says why."""


class FencedError(SessionEndedError):
    """The executor ended the session because a newer scheduler has taken it over."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Where the executor is and how long it may be silent."""

    address: str
    stall_timeout_s: float


class ExecutorLink:
    """Keeps one session with the executor open for as long as the process lives."""

    def __init__(self, engine: Engine, settings: LinkSettings, on_change: StateListener) -> None:
        self._engine = engine
        self._settings = settings
        self._on_change = on_change
        self.info: executor_pb2.GetExecutorInfoResponse | None = None
        self._outbox: deque[Plan] = deque()
        self._outbox_filled = asyncio.Event()
        self._last_result_s = 0.0
        # Taking the executor back from the scheduler that took it would never end.
        self._is_fenced = False

    @property
    def address(self) -> str:
        """Address of the executor."""
        return self._settings.address

    async def run(self) -> None:
        """Opens session after session until cancelled."""
        backoff_s = _MIN_BACKOFF_S
        last_problem = ""
        while True:
            had_session = False
            try:
                await self._run_session()
            except (SessionEndedError, grpc.aio.AioRpcError) as error:
                self._is_fenced = self._is_fenced or isinstance(error, FencedError)
                problem = self._describe(error)
                had_session = self.info is not None
                if had_session or problem != last_problem:
                    logger.warning("executor %s: %s", self.address, problem)
                last_problem = problem
            except Exception as error:
                # A bug that one session or one request brings out must not end the service.
                had_session = self.info is not None
                last_problem = f"the scheduler failed in a session: {error!r}"
                logger.exception("executor %s: %s", self.address, last_problem)
            finally:
                self.info = None
                await self._on_change(False)
            self._engine.on_disconnected(last_problem)
            backoff_s = _MIN_BACKOFF_S if had_session else min(2 * backoff_s, _MAX_BACKOFF_S)
            # Jitter keeps several schedulers from knocking at the same moment.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))

    async def _run_session(self) -> None:
        async with grpc.aio.insecure_channel(
            self.address, options=EXECUTOR_CHANNEL_OPTIONS
        ) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            info = await stub.GetExecutorInfo(
                executor_pb2.GetExecutorInfoRequest(), timeout=_CALL_TIMEOUT_S
            )
            self._check_model(info)
            if self._is_fenced and info.has_session:
                raise SessionEndedError(
                    "another scheduler has taken it over; this one waits until that one is gone"
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

    def _check_model(self, info: executor_pb2.GetExecutorInfoResponse) -> None:
        model = self._engine.model
        if info.model_fingerprint != model.fingerprint:
            raise SessionEndedError(
                f"it serves another model (fingerprint {info.model_fingerprint[:12]}, this "
                f"scheduler serves {model.name!r}, fingerprint {model.fingerprint[:12]}); start "
                "both services with the same --model"
            )

    async def _start(self, call: ExecuteCall, epoch: int) -> None:
        start = executor_pb2.StartSession(expected_epoch=epoch, session_id=secrets.randbits(64))
        async with _limit(_CALL_TIMEOUT_S, "did not answer StartSession"):
            await _write(call, executor_pb2.ExecuteRequest(start_session=start))
            answer = await _read(call)
        if answer is None or not answer.HasField("session_started"):
            raise SessionEndedError("did not answer StartSession with SessionStarted")

    async def _converse(
        self, call: ExecuteCall, info: executor_pb2.GetExecutorInfoResponse
    ) -> None:
        self.info = info
        self._outbox.clear()
        self._last_result_s = time.monotonic()
        self._engine.on_connected(_capacity(info), self._send)
        await self._on_change(True)
        logger.info(
            "executor %s: connected, %d blocks of %d tokens, %d slots, %s on %s",
            *(self.address, info.num_blocks, info.block_size, info.max_num_seqs),
            *(info.dtype, info.device),
        )
        tasks = [
            asyncio.create_task(self._read_results(call), name="read results"),
            asyncio.create_task(self._write_plans(call), name="write plans"),
            asyncio.create_task(self._watch_progress(), name="watch progress"),
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

    async def _write_plans(self, call: ExecuteCall) -> None:
        while True:
            await self._outbox_filled.wait()
            self._outbox_filled.clear()
            while self._outbox:
                plan = encode_plan(self._outbox.popleft())
                await _write(call, executor_pb2.ExecuteRequest(plan=plan))

    async def _read_results(self, call: ExecuteCall) -> None:
        while True:
            message = await _read(call)
            if message is None:
                raise await _end_of(call)
            self._last_result_s = time.monotonic()
            try:
                self._engine.on_results(
                    [decode_step_result(result) for result in message.step_results.results]
                )
            except (WireError, ExecutorProtocolError) as error:
                raise SessionEndedError(f"broke the protocol: {error}") from error

    async def _watch_progress(self) -> None:
        limit_s = self._settings.stall_timeout_s
        while True:
            await asyncio.sleep(limit_s / 10)
            if not self._engine.scheduler.has_work_in_flight:
                # The clock starts with the work.
                self._last_result_s = time.monotonic()
                continue
            silent_s = time.monotonic() - self._last_result_s
            if silent_s > limit_s:
                raise SessionEndedError(f"made no progress for {silent_s:.1f} s")

    @staticmethod
    def _describe(error: Exception) -> str:
        if isinstance(error, grpc.aio.AioRpcError):
            return f"{error.code().name}: {error.details()}"
        return str(error)


def _capacity(info: executor_pb2.GetExecutorInfoResponse) -> ExecutorCapacity:
    return ExecutorCapacity(
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
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
    kind = FencedError if code is grpc.StatusCode.ABORTED else SessionEndedError
    return kind(f"ended the session: {code.name}: {details}")


@contextlib.asynccontextmanager
async def _limit(timeout_s: float, problem: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise SessionEndedError(f"{problem} within {timeout_s:g} s") from error
