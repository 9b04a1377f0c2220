"""The executor's gRPC service: one stream per session, translated into commands for the worker."""

import logging
import secrets
import threading
import time
from collections.abc import Iterator

import grpc

from executor_service.engine_factory import Engine
from executor_service.metrics import ExecutorMetrics
from executor_service.plan_reader import PlanError, read_plan
from executor_service.session import EndReason, Session, SessionOptions
from executor_service.worker import CloseSession, OpenSession, QueuedPlan, Worker
from nanovllm.logs import fields
from nanovllm.v1 import executor_pb2, executor_pb2_grpc

logger = logging.getLogger(__name__)

# How long a stream may stay open without StartSession.
_FIRST_MESSAGE_S = 10.0
_END_CODES = {
    EndReason.FENCED: grpc.StatusCode.ABORTED,
    EndReason.PROTOCOL: grpc.StatusCode.INVALID_ARGUMENT,
    EndReason.FAILED: grpc.StatusCode.INTERNAL,
    EndReason.SHUTDOWN: grpc.StatusCode.UNAVAILABLE,
    EndReason.CLOSED: grpc.StatusCode.CANCELLED,
}


class ExecutorServicer(executor_pb2_grpc.ExecutorServiceServicer):
    """nanovllm.v1.ExecutorService."""

    def __init__(
        self, engine: Engine, worker: Worker, metrics: ExecutorMetrics, fingerprint: str
    ) -> None:
        self._engine = engine
        self._worker = worker
        self._metrics = metrics
        self._fingerprint = fingerprint
        # Drawn anew by every process: a plan made for one must not reach the next.
        self._epoch = secrets.randbits(63) + 1

    def GetExecutorInfo(  # noqa: N802
        self, request: executor_pb2.GetExecutorInfoRequest, context: grpc.ServicerContext
    ) -> executor_pb2.GetExecutorInfoResponse:
        """Describes this process."""
        limits = self._engine.limits
        return executor_pb2.GetExecutorInfoResponse(
            epoch=self._epoch,
            model_fingerprint=self._fingerprint,
            vocab_size=limits.vocab_size,
            block_size=limits.block_size,
            num_blocks=limits.num_blocks,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
            dtype=self._engine.dtype_name,
            attention_backend=self._engine.attention_backend,
            device=self._engine.device_name,
            has_session=self._worker.has_session,
            num_active_slots=self._worker.num_active_slots,
        )

    def Execute(  # noqa: N802
        self,
        request_iterator: Iterator[executor_pb2.ExecuteRequest],
        context: grpc.ServicerContext,
    ) -> Iterator[executor_pb2.ExecuteResponse]:
        """Runs one session. This thread sends results; another reads plans."""
        session = self._open(request_iterator, context)
        reader = threading.Thread(
            target=self._read_plans, args=(request_iterator, session), name="plans", daemon=True
        )
        context.add_callback(lambda: self._worker.submit(CloseSession(session)))
        reader.start()
        # While the device hangs there is no session; the scheduler finds out and its requests wait.
        if session.wait_until_open():
            yield executor_pb2.ExecuteResponse(
                session_started=executor_pb2.SessionStarted(
                    epoch=self._epoch, session_id=session.session_id
                )
            )
        while (results := session.take()) is not None:
            yield _response(results, session)
        reason = session.end_reason or EndReason.CLOSED
        logger.info(
            "session ended",
            extra=fields(
                session_id=f"{session.session_id:x}",
                reason=reason.value,
                detail=session.end_message,
            ),
        )
        context.abort(_END_CODES[reason], session.end_message)

    def _open(
        self,
        request_iterator: Iterator[executor_pb2.ExecuteRequest],
        context: grpc.ServicerContext,
    ) -> Session:
        # A silent stream would hold one of few threads for ever.
        limit = threading.Timer(_FIRST_MESSAGE_S, context.cancel)
        limit.start()
        try:
            first = next(request_iterator, None)
        finally:
            limit.cancel()
        if first is None or first.WhichOneof("message") != "start_session":
            raise _refuse(
                context, grpc.StatusCode.INVALID_ARGUMENT, "the first message must be StartSession"
            )
        if first.start_session.expected_epoch != self._epoch:
            raise _refuse(
                context,
                grpc.StatusCode.FAILED_PRECONDITION,
                "this executor was restarted; call GetExecutorInfo again",
            )
        start = first.start_session
        session = Session(
            start.session_id,
            SessionOptions(
                start.heartbeat_interval_ms / 1000 if start.heartbeat_interval_ms else None,
                start.max_messages_in_flight or None,
            ),
            self._metrics.results_queue_delay.observe,
        )
        self._worker.submit(OpenSession(session))
        self._metrics.count_session()
        logger.info("session opened", extra=fields(session_id=f"{session.session_id:x}"))
        return session

    def _read_plans(
        self, request_iterator: Iterator[executor_pb2.ExecuteRequest], session: Session
    ) -> None:
        message = "the stream was closed"
        try:
            for request in request_iterator:
                if request.num_messages_taken:
                    session.acknowledge(request.num_messages_taken)
                message_kind = request.WhichOneof("message")
                if message_kind is None and request.num_messages_taken:
                    continue
                if message_kind != "plan":
                    raise PlanError("only plans may follow StartSession")
                plan = read_plan(request.plan, self._engine.limits)
                self._worker.submit(QueuedPlan(session, plan, time.monotonic()))
        except PlanError as error:
            message = str(error)
            session.end(EndReason.PROTOCOL, message)
        except grpc.RpcError:
            # The peer is gone or cancelled the call.
            pass
        finally:
            session.end(EndReason.CLOSED, message)
            self._worker.submit(CloseSession(session))


def _response(results: executor_pb2.StepResults, session: Session) -> executor_pb2.ExecuteResponse:
    if results.results:
        return executor_pb2.ExecuteResponse(step_results=results)
    return executor_pb2.ExecuteResponse(
        heartbeat=executor_pb2.Heartbeat(num_iterations=session.num_iterations)
    )


def _refuse(context: grpc.ServicerContext, code: grpc.StatusCode, message: str) -> RuntimeError:
    """Ends the call with a status; the returned exception is never seen, for abort raises."""
    context.abort(code, message)
    return RuntimeError(message)
