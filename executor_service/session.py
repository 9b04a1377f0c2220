"""One scheduler's session: what it has sent and what it will be told."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from nanovllm.v1 import executor_pb2


class EndReason(Enum):
    """Why a session ended."""

    FENCED = "fenced"
    PROTOCOL = "protocol"
    FAILED = "failed"
    SHUTDOWN = "shutdown"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """What the scheduler asks of a session."""

    #: How long `Session.take` waits for results; None: until there are some.
    heartbeat_interval_s: float | None = None
    #: Messages with results that the scheduler has not taken in; None: any number.
    max_messages_in_flight: int | None = None


class Session:
    """The worker puts results in, the stream's sender thread takes them out.

    Results that pile up while the stream or the scheduler is busy leave in one message.

    Args:
        session_id: The scheduler's name for it.
        options: What the scheduler asks for.
        on_delay: Told of each result how many seconds after its end it was taken.
    """

    # Bounds one message; a slow stream gets several.
    _MAX_RESULTS_PER_MESSAGE = 256

    def __init__(
        self,
        session_id: int,
        options: SessionOptions = SessionOptions(),
        on_delay: Callable[[float], None] = lambda delay_s: None,
    ) -> None:
        self.session_id = session_id
        self._options = options
        self._on_delay = on_delay
        # Of the newest result; written by the worker only.
        self.num_iterations = 0
        # Set when the worker took the session, or when it ended.
        self._settled = threading.Event()
        self.end_reason: EndReason | None = None
        self.end_message = ""
        # Guards all below; notified when `take` may have something to do.
        self._changed = threading.Condition()
        # Results with the time of their end.
        self._results: deque[tuple[executor_pb2.StepResult, float | None]] = deque()
        self._num_messages = 0
        self._num_messages_taken = 0

    @property
    def ended(self) -> bool:
        """Whether nothing more will be put in."""
        return self.end_reason is not None

    def open(self) -> None:
        """The worker has taken the session: all slots are free."""
        self._settled.set()

    def wait_until_open(self) -> bool:
        """Waits for the worker; returns False if the session ended first."""
        self._settled.wait()
        return not self.ended

    def put(self, result: executor_pb2.StepResult, finished_s: float | None = None) -> None:
        """Queues a result; dropped if the session has ended.

        `finished_s` is when the iteration's results were there, a time of `time.monotonic()`.
        """
        self.num_iterations = max(self.num_iterations, result.iteration)
        with self._changed:
            if not self.ended:
                self._results.append((result, finished_s))
                self._changed.notify()

    def acknowledge(self, num_messages: int) -> None:
        """The scheduler has taken in this many messages with results."""
        with self._changed:
            self._num_messages_taken = num_messages
            self._changed.notify()

    def end(self, reason: EndReason, message: str) -> None:
        """Ends the session once; the first reason counts."""
        with self._changed:
            if self.ended:
                return
            self.end_reason = reason
            self.end_message = message
            self._changed.notify()
        self._settled.set()

    def take(self) -> executor_pb2.StepResults | None:
        """Waits for results and returns all there are, or None when the session has ended.

        Returns no results when there were none to send for the heartbeat interval.
        """
        with self._changed:
            if not self._changed.wait_for(self._may_send, self._options.heartbeat_interval_s):
                return executor_pb2.StepResults()
            if not self._results:
                return None
            count = min(len(self._results), self._MAX_RESULTS_PER_MESSAGE)
            taken = [self._results.popleft() for _ in range(count)]
            self._num_messages += 1
        now_s = time.monotonic()
        for _, finished_s in taken:
            if finished_s is not None:
                self._on_delay(now_s - finished_s)
        return executor_pb2.StepResults(results=[result for result, _ in taken])

    def _may_send(self) -> bool:
        if self.ended:
            return True
        limit = self._options.max_messages_in_flight
        in_flight = self._num_messages - self._num_messages_taken
        return bool(self._results) and (limit is None or in_flight < limit)
