"""One scheduler's session: what it has sent and what it will be told."""

import queue
import threading
import time
from collections.abc import Callable
from enum import Enum

from nanovllm.v1 import executor_pb2


class EndReason(Enum):
    """Why a session ended."""

    FENCED = "fenced"
    PROTOCOL = "protocol"
    FAILED = "failed"
    SHUTDOWN = "shutdown"
    CLOSED = "closed"


class Session:
    """The worker puts results in, the stream's sender thread takes them out.

    Results that pile up while the stream is busy leave in one message.

    Args:
        session_id: The scheduler's name for it.
        heartbeat_interval_s: How long `take` waits for results; None: until there are some.
        on_delay: Told of each result how many seconds after its end it was taken.
    """

    # Bounds one message; a slow stream gets several.
    _MAX_RESULTS_PER_MESSAGE = 256

    def __init__(
        self,
        session_id: int,
        heartbeat_interval_s: float | None = None,
        on_delay: Callable[[float], None] = lambda delay_s: None,
    ) -> None:
        self.session_id = session_id
        self._on_delay = on_delay
        # Of the newest result; written by the worker only.
        self.num_iterations = 0
        self._heartbeat_interval_s = heartbeat_interval_s
        # Set when the worker took the session, or when it ended.
        self._settled = threading.Event()
        self.end_reason: EndReason | None = None
        self.end_message = ""
        # Results with the time of their end; None when there will be no more.
        self._results: queue.SimpleQueue[tuple[executor_pb2.StepResult, float | None] | None] = (
            queue.SimpleQueue()
        )
        self._lock = threading.Lock()

    @property
    def ended(self) -> bool:
        """Whether nothing more will be sent."""
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
        if not self.ended:
            self._results.put((result, finished_s))

    def end(self, reason: EndReason, message: str) -> None:
        """Ends the session once; the first reason counts."""
        with self._lock:
            if self.end_reason is not None:
                return
            self.end_reason = reason
            self.end_message = message
        self._results.put(None)
        self._settled.set()

    def take(self) -> executor_pb2.StepResults | None:
        """Waits for results and returns all there are, or None when the session has ended.

        Returns no results when there were none for `heartbeat_interval_s`.
        """
        try:
            first = self._results.get(timeout=self._heartbeat_interval_s)
        except queue.Empty:
            return executor_pb2.StepResults()
        if first is None:
            return None
        taken = [first]
        while len(taken) < self._MAX_RESULTS_PER_MESSAGE:
            try:
                item = self._results.get_nowait()
            except queue.Empty:
                break
            if item is None:
                # Seen again by the next call.
                self._results.put(None)
                break
            taken.append(item)
        now_s = time.monotonic()
        for _, finished_s in taken:
            if finished_s is not None:
                self._on_delay(now_s - finished_s)
        return executor_pb2.StepResults(results=[result for result, _ in taken])
