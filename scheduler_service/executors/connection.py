"""One executor's session as the pool sees it, and what the link that keeps it talks to."""

import time
from collections.abc import Callable, Iterable
from typing import Protocol

from nanovllm.v1 import executor_pb2
from scheduler_service.executors.absence import ExecutorAbsence
from scheduler_service.executors.member import Member
from scheduler_service.plan import Plan, StepResult
from scheduler_service.scheduler import ExecutorCapacity

SendPlan = Callable[[Plan], None]


class ConnectionEvents(Protocol):
    """Who a connection tells of what happens to it, on the event loop."""

    def on_connected(self, connection: "Connection", capacity: ExecutorCapacity) -> None:
        """A session is open: all slots are free, the cache is empty."""

    def on_lost(self, connection: "Connection") -> None:
        """The session is over."""

    def on_results(self, connection: "Connection", results: Iterable[StepResult]) -> None:
        """Results arrived, in order. Raises ExecutorProtocolError."""

    def on_absent_for_too_long(self, connection: "Connection") -> None:
        """Nobody should go on waiting for this executor."""


class Connection:
    """Lives on the event loop. Its link calls the methods that begin with `on_`."""

    def __init__(self, member: Member, events: ConnectionEvents, wait_timeout_s: float) -> None:
        self.member = member
        self._events = events
        self._send: SendPlan | None = None
        #: What the executor says of itself; None without a session.
        self.info: executor_pb2.GetExecutorInfoResponse | None = None
        self.absence = ExecutorAbsence(wait_timeout_s, lambda: events.on_absent_for_too_long(self))

    @property
    def address(self) -> str:
        """Address of the executor."""
        return self.member.address

    @property
    def has_session(self) -> bool:
        """Whether plans can be sent."""
        return self._send is not None

    @property
    def has_work_in_flight(self) -> bool:
        """Whether the executor owes a result."""
        return self.member.scheduler.has_work_in_flight

    def on_connected(
        self,
        info: executor_pb2.GetExecutorInfoResponse,
        capacity: ExecutorCapacity,
        send: SendPlan,
    ) -> None:
        """A session is open; `send` takes its plans."""
        self.absence.end()
        self.info = info
        self._send = send
        self.member.is_suspect = False
        self.member.num_sessions += 1
        self._events.on_connected(self, capacity)

    def on_disconnected(self, problem: str) -> None:
        """The session is over, or another attempt to open one failed; clients may be told why."""
        self.absence.problem = problem
        if self._send is not None:
            self._send = self.info = None
            self._events.on_lost(self)
            self.absence.begin()

    def on_results(self, results: Iterable[StepResult]) -> None:
        """Takes in results in order; after `close` none. Raises ExecutorProtocolError."""
        if self._send is not None:
            self._events.on_results(self, results)

    def on_suspicion(self, is_suspect: bool) -> None:
        """The executor owes a sign of life, or has given it."""
        self.member.is_suspect = is_suspect

    def send_plans(self) -> None:
        """Makes and sends every plan that there is to make."""
        if self._send is not None:
            while (plan := self.member.scheduler.schedule(time.monotonic())) is not None:
                self._send(plan)

    def close(self) -> None:
        """Stops the clock; the executor is not waited for any more."""
        self._send = self.info = None
        self.absence.end()
