"""What a request may cost before it is let in: places, tokens, waiting time and memory.

Every check works on counters, so that refusing costs microseconds however long the queue is, and
comes before the prompt is tokenized or anything is allocated for the request.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from scheduler_service.errors import (
    ClientLimitError,
    NeverFitsError,
    QueueFullError,
    QueueTokensError,
    QueueWaitError,
    ResponseMemoryError,
)
from scheduler_service.executors.load import FleetLoad
from scheduler_service.lengths import SequenceLengths
from scheduler_service.queue_wait import DrainRate, Load, ServiceTime, expected_wait_s
from scheduler_service.validation import GenerateSpec

# Memory of one token's log-probabilities while nobody has read them: the object with its two lists,
# and an integer, a float and their two references for each of the most probable tokens (CPython).
_LOGPROBS_BYTES = 256
_TOP_LOGPROB_BYTES = 72

_MIN_RETRY_S = 0.1
_MAX_RETRY_S = 30.0
# Hint while nothing is known about the queue's speed.
_DEFAULT_RETRY_S = 1.0
# The share that "auto" stands for: a caller of a server that has much more to do than it can still
# gets its answer within twice the time.
_WAIT_PER_SERVICE_TIME = 0.5


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """Bounds on what may be under way; see the settings of the same names."""

    max_queued_requests: int
    max_queued_tokens: int
    # None: a share of the time that requests take; 0: no bound.
    max_queue_wait_s: float | None
    # 0: no bound.
    max_requests_per_client: int
    max_response_bytes: int


class Ticket:
    """What one request holds of the limits, from its reservation to its end."""

    def __init__(self, admission: "Admission", client: str, n: int, response_bytes: int) -> None:
        self._admission = admission
        self._is_released = False
        self.client = client
        # Sequences that are not in the scheduler's queue yet.
        self.num_reserved = n
        self.response_bytes = response_bytes

    def submitted(self) -> None:
        """The sequences are in the scheduler's queue, which counts them from here on."""
        self._admission.num_reserved -= self.num_reserved
        self.num_reserved = 0

    def release(self) -> None:
        """Gives everything back. Repeating it does nothing."""
        if not self._is_released:
            self._is_released = True
            self.submitted()
            self._admission.give_back(self)


class Admission:
    """Decides who gets in. Lives on the engine's event loop."""

    def __init__(
        self,
        limits: AdmissionLimits,
        load: FleetLoad,
        lengths: SequenceLengths,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._load = load
        self._lengths = lengths
        self._clock = clock
        self._drain_rate = DrainRate()
        self._service_time = ServiceTime()
        self._requests_of: dict[str, int] = {}
        self._response_bytes = 0
        #: Sequences of requests whose prompts are being tokenized.
        self.num_reserved = 0

    def check_arrival(self, client: str, priority: int) -> None:
        """Refuses what has no chance, before the request is looked at any closer.

        Raises ClientLimitError, QueueFullError or QueueWaitError.
        """
        limit = self._limits.max_requests_per_client
        if limit and self._requests_of.get(client, 0) >= limit:
            raise ClientLimitError(
                f"this client has {limit} requests under way, which is the limit; wait for one of "
                "them",
                self._retry_after_s(self._service_time.mean_s),
            )
        self._check_places(1)
        self._check_wait(priority)

    def reserve(self, spec: GenerateSpec, client: str) -> Ticket:
        """Counts a valid request in.

        Raises QueueFullError, QueueTokensError, ResponseMemoryError or NeverFitsError.
        """
        self._check_places(spec.n)
        self._lengths.check_max_tokens(spec.max_tokens)
        if spec.max_tokens is not None:
            self._check_tokens(spec.n * self._lengths.max_total_tokens(1, spec.max_tokens))
        response_bytes = self._check_response(spec)
        ticket = Ticket(self, client, spec.n, response_bytes)
        self.num_reserved += spec.n
        self._response_bytes += response_bytes
        self._requests_of[client] = self._requests_of.get(client, 0) + 1
        return ticket

    def check_queue(self, spec: GenerateSpec, max_total_tokens: int) -> None:
        """Refuses a request whose prompt, known by now, is too much. Raises QueueTokensError."""
        self._check_tokens(spec.n * max_total_tokens)

    def give_back(self, ticket: Ticket) -> None:
        """Forgets a request; called by its ticket."""
        self._response_bytes -= ticket.response_bytes
        num_left = self._requests_of[ticket.client] - 1
        if num_left:
            self._requests_of[ticket.client] = num_left
        else:
            del self._requests_of[ticket.client]

    def observe_plan(self, now_s: float) -> None:
        """Looks at the queue as a plan leaves it."""
        load = self._load
        self._drain_rate.observe(now_s, load.num_waiting_tokens(), load.num_admitted_tokens)

    def observe_service_time(self, duration_s: float) -> None:
        """A sequence ran to its own end, `duration_s` after its first admission."""
        self._service_time.observe(duration_s)

    def on_executor_lost(self) -> None:
        """The last executor is gone; until there is one, waiting says nothing about the speed."""
        self._drain_rate.pause(self._clock())

    def expected_wait_s(self, priority: int) -> float | None:
        """How long a request of this priority would wait for a slot; None if nothing is known."""
        load = self._load
        num_tokens_ahead = load.num_waiting_tokens(priority)
        if self.num_reserved and load.num_running:
            # Their prompts are not known yet; take them for what runs.
            mean_tokens = load.num_running_tokens // load.num_running
            num_tokens_ahead += self.num_reserved * mean_tokens
        return expected_wait_s(
            Load(num_tokens_ahead, load.num_running_tokens, load.is_full),
            self._drain_rate.tokens_per_s(self._clock()),
            self._service_time.mean_s,
        )

    @property
    def _max_wait_s(self) -> float | None:
        """The bound that holds now; None while it is unknown."""
        if self._limits.max_queue_wait_s is not None:
            return self._limits.max_queue_wait_s
        service_time_s = self._service_time.mean_s
        return None if service_time_s is None else _WAIT_PER_SERVICE_TIME * service_time_s

    def _check_places(self, num_new: int) -> None:
        waiting = self._load.num_waiting + self.num_reserved
        if waiting + num_new > self._limits.max_queued_requests:
            raise QueueFullError(
                f"{waiting} sequences wait already, the limit is "
                f"{self._limits.max_queued_requests}; try again later",
                self._retry_after_s(self.expected_wait_s(0)),
            )

    def _check_wait(self, priority: int) -> None:
        if self._limits.max_queue_wait_s == 0 or not self._load.is_connected:
            return  # without an executor the wait is bounded by --executor-wait-timeout-s
        wait_s, max_wait_s = self.expected_wait_s(priority), self._max_wait_s
        if wait_s is None or max_wait_s is None:
            # Nothing has been measured yet. Another batch is about what may wait then.
            waiting = self._load.num_waiting + self.num_reserved
            if waiting < self._load.max_num_seqs:
                return
            raise QueueWaitError(
                f"{waiting} sequences wait already and nothing is known about their speed yet; "
                "try again later",
                self._retry_after_s(wait_s),
            )
        if wait_s > max_wait_s:
            raise QueueWaitError(
                f"a new request would wait for {wait_s:.1f} s, the limit is {max_wait_s:.1f} s; "
                "try again later",
                self._retry_after_s(wait_s),
            )

    def _check_tokens(self, num_new: int) -> None:
        waiting = self._load.num_waiting_tokens()
        # An empty queue takes any request: it may not even have to wait.
        if waiting and waiting + num_new > self._limits.max_queued_tokens:
            raise QueueTokensError(
                f"sequences of {waiting} tokens wait already and this request has up to {num_new}; "
                f"the limit is {self._limits.max_queued_tokens}; try again later",
                self._retry_after_s(self.expected_wait_s(0)),
            )

    def _check_response(self, spec: GenerateSpec) -> int:
        """Returns the memory that log-probabilities may need if the client does not read."""
        num_logprobs = spec.samplings[0].num_logprobs
        if num_logprobs < 0:
            return 0
        num_tokens = spec.n * self._lengths.max_total_tokens(0, spec.max_tokens)
        num_bytes = num_tokens * (_LOGPROBS_BYTES + num_logprobs * _TOP_LOGPROB_BYTES)
        limit = self._limits.max_response_bytes
        if num_bytes > limit:
            raise NeverFitsError(
                f"log-probabilities of {num_tokens} tokens may need {num_bytes} bytes, the limit "
                f"is {limit}; lower n, max_tokens or logprobs"
            )
        if self._response_bytes + num_bytes > limit:
            raise ResponseMemoryError(
                "requests with log-probabilities may already need "
                f"{self._response_bytes} of {limit} bytes; try again later",
                self._retry_after_s(self._service_time.mean_s),
            )
        return num_bytes

    @staticmethod
    def _retry_after_s(wait_s: float | None) -> float:
        """When to come back: once what waits now has got its turn."""
        hint_s = _DEFAULT_RETRY_S if wait_s is None else wait_s
        return min(max(hint_s, _MIN_RETRY_S), _MAX_RETRY_S)
