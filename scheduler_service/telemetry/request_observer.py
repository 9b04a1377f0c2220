"""Watches Generate calls from arrival to end, and then writes the log line and the trace."""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import grpc

from scheduler_service.access.caller import caller_of
from scheduler_service.telemetry.call_record import (
    CANCELLED,
    DEADLINE_EXCEEDED,
    GENERATE,
    INTERNAL,
    CallRecord,
    OutputTexts,
)
from scheduler_service.telemetry.request_log import RequestLog

logger = logging.getLogger(__name__)


class IdentifiedRequest(Protocol):
    """A request of any API."""

    @property
    def request_id(self) -> str:
        """As the client gave it; may be empty."""


class Tracer(Protocol):
    """Makes traces of calls that are over."""

    def record(self, call: CallRecord) -> str | None:
        """Returns the id of the trace that the call belongs to."""

    def close(self) -> None:
        """Sends what was not sent yet, as far as that is possible in a moment. Blocks."""


class RequestObserver:
    """Knows every call; without a tracer and with logs below INFO it does next to nothing."""

    def __init__(self, log: RequestLog | None = None, tracer: Tracer | None = None) -> None:
        self._log = log or RequestLog()
        self._tracer = tracer

    @contextmanager
    def observe(
        self,
        request: IdentifiedRequest,
        context: grpc.aio.ServicerContext,
        method: str = GENERATE,
    ) -> Iterator[CallRecord]:
        """The record of a call, to be filled in inside the block."""
        call = CallRecord(time.monotonic(), caller_of(context), request.request_id, method=method)
        if self._tracer is not None:
            call.metadata = tuple(context.invocation_metadata() or ())
            call.keeps_history = True
        if self._log.log_prompts:
            call.texts = OutputTexts()
        try:
            yield call
        except asyncio.CancelledError:
            remaining_s = context.time_remaining()
            is_late = remaining_s is not None and remaining_s <= 0
            call.code = DEADLINE_EXCEEDED if is_late else CANCELLED
            raise
        except Exception:
            # Also how gRPC leaves the handler of a call that got its status already.
            if call.error is None:
                call.code = INTERNAL
            raise
        finally:
            call.ended_s = time.monotonic()
            self._report(call)

    def _report(self, call: CallRecord) -> None:
        try:
            trace_id = self._tracer.record(call) if self._tracer is not None else None
            self._log.write(call, trace_id)
        except Exception:
            # The client has its answer; that nobody else gets to know must not change it.
            logger.exception("a request could not be reported")

    async def close(self) -> None:
        """Writes and sends what is left."""
        self._log.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
