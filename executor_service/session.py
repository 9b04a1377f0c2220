"""One scheduler's session: what it has sent and what it will be told."""

import queue
import threading
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
    """

    # Bounds one message; a slow stream gets several.
    _MAX_RESULTS_PER_MESSAGE = 256

    def __init__(self, session_id: int) -> None:
        self.session_id = session_id
        self.end_reason: EndReason | None = None
        self.end_message = ""
        self._results: queue.SimpleQueue[executor_pb2.StepResult | None] = queue.SimpleQueue()
        self._lock = threading.Lock()

    @property
    def ended(self) -> bool:
        """Whether nothing more will be sent."""
        return self.end_reason is not None

    def put(self, result: executor_pb2.StepResult) -> None:
        """Queues a result; dropped if the session has ended."""
        if not self.ended:
            self._results.put(result)

    def end(self, reason: EndReason, message: str) -> None:
        """Ends the session once; the first reason counts."""
        with self._lock:
            if self.end_reason is not None:
                return
            self.end_reason = reason
            self.end_message = message
        self._results.put(None)

    def take(self) -> executor_pb2.StepResults | None:
        """Waits for results and returns all there are, or None when the session has ended."""
        first = self._results.get()
        if first is None:
            return None
        message = executor_pb2.StepResults(results=[first])
        while len(message.results) < self._MAX_RESULTS_PER_MESSAGE:
            try:
                result = self._results.get_nowait()
            except queue.Empty:
                break
            if result is None:
                # Seen again by the next call.
                self._results.put(None)
                break
            message.results.append(result)
        return message
