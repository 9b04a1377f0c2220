"""The engine: joins requests, the pure scheduler and the executor link on one event loop.

Everything here runs on that loop, so nothing is locked. Servicers submit requests and wait for
deltas; the link reports sessions and results; the engine turns both into plans.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from scheduler_service.completion import Completion, Delta
from scheduler_service.delivery import DeliveryQueue
from scheduler_service.detokenizer import IncrementalDetokenizer, StopMatcher
from scheduler_service.errors import (
    DeadlineError,
    DuplicateRequestError,
    ExecutorFailedError,
    InvalidFieldError,
    NeverFitsError,
    QueueFullError,
    RequestError,
)
from scheduler_service.executor_absence import ExecutorAbsence
from scheduler_service.metrics import SchedulerMetrics
from scheduler_service.model_spec import ModelSpec
from scheduler_service.plan import Plan, StepResult
from scheduler_service.ranges import INT32_MAX
from scheduler_service.request_metrics import record_finished, record_tokens
from scheduler_service.reservation import Reservation
from scheduler_service.scheduler import ExecutorCapacity, Scheduler
from scheduler_service.sequence import FinishReason, Sequence, SequenceId
from scheduler_service.tokenizer import Tokenizer
from scheduler_service.validation import GenerateSpec

logger = logging.getLogger(__name__)

SendPlan = Callable[[Plan], None]


@dataclass(slots=True, eq=False)
class LiveRequest:
    """A request from submission to its last delta."""

    request_id: str
    completions: list[Completion]
    # As asked for, per completion; None: as many as fit.
    max_tokens: int | None
    # Whether the request waits to be told of a change.
    is_queued: bool = False
    # Set when a completion may have a new delta, or the request failed.
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    error: RequestError | None = None

    @property
    def is_finished(self) -> bool:
        """Whether every completion ended; their last deltas may still have to be written."""
        return all(completion.seq.is_finished for completion in self.completions)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds that protect the process and its callers."""

    max_queued_requests: int
    executor_wait_timeout_s: float
    max_executor_losses: int


class Engine:
    """Owns every live request."""

    # What a client that was refused for a full queue should wait; queues drain in seconds.
    _RETRY_AFTER_S = 1.0

    def __init__(
        self,
        scheduler: Scheduler,
        model: ModelSpec,
        tokenizer: Tokenizer,
        metrics: SchedulerMetrics,
        limits: EngineLimits,
    ) -> None:
        self.scheduler = scheduler
        self.model = model
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._limits = limits
        self._requests: dict[str, LiveRequest] = {}
        self._reservations: dict[str, Reservation] = {}
        self._num_reserved_seqs = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._owners: dict[SequenceId, tuple[LiveRequest, Completion]] = {}
        self._sequence_ids = map(SequenceId, itertools.count())
        self._send: SendPlan | None = None
        self._plan_scheduled = False
        self._deliveries = DeliveryQueue()
        self._had_session = False
        self._absence = ExecutorAbsence(
            limits.executor_wait_timeout_s, self._on_executor_absent_for_too_long
        )

    @property
    def max_model_len(self) -> int:
        """Longest sequence: the model's own limit, or the executor's if that is less."""
        capacity = self.scheduler.capacity
        return min(self.model.max_model_len, capacity.max_model_len if capacity else INT32_MAX)

    def start(self) -> None:
        """Starts the clock on the first connection."""
        self._absence.begin()

    # Requests

    @contextmanager
    def reserve(self, spec: GenerateSpec) -> Iterator[Reservation]:
        """Holds the request's id and its place in the queue while its prompt is tokenized.

        Raises RequestError if the id is taken or the queue is full.
        """
        self._check_id(spec.request_id)
        self._check_executor()
        self._check_queue(spec.n)
        reservation = Reservation(spec)
        self._reservations[spec.request_id] = reservation
        self._num_reserved_seqs += spec.n
        self._idle.clear()
        try:
            yield reservation
        finally:
            del self._reservations[spec.request_id]
            self._num_reserved_seqs -= spec.n
            self._update_idle()

    def submit(self, reservation: Reservation, prompt_token_ids: list[int]) -> LiveRequest:
        """Queues a request whose reservation is held; one that was aborted meanwhile is over.

        Raises RequestError and keeps nothing if it is refused.
        """
        spec = reservation.spec
        if not reservation.is_aborted:
            self._check_executor()
            self._check_prompt_length(len(prompt_token_ids))
        seqs = self._new_sequences(spec, prompt_token_ids)
        if not reservation.is_aborted and not self.scheduler.fits(seqs[0]):
            raise self._never_fits(seqs[0])
        request = LiveRequest(
            spec.request_id,
            [self._new_completion(spec, index, seq) for index, seq in enumerate(seqs)],
            spec.max_tokens,
        )
        self._requests[request.request_id] = request
        for completion in request.completions:
            self._owners[completion.seq.seq_id] = (request, completion)
            self.scheduler.add(completion.seq)
        if reservation.is_aborted:
            self._finish_all(request, FinishReason.ABORT)
        self._plan_soon()
        return request

    async def wait_until_idle(self) -> None:
        """Waits until no request is live or being tokenized."""
        await self._idle.wait()

    async def deltas(
        self, request: LiveRequest, deadline_s: float | None = None
    ) -> AsyncGenerator[Delta]:
        """Yields deltas until every completion has ended. Raises RequestError.

        Leaving the iterator early, by cancellation say, ends the request. `deadline_s` is a time
        of `time.monotonic()`.
        """
        try:
            while True:
                request.changed.clear()
                if request.error is not None:
                    raise request.error
                for completion in request.completions:
                    delta = completion.take_delta()
                    if delta is not None:
                        yield delta
                if all(completion.finished_sent for completion in request.completions):
                    return
                await self._wait(request, deadline_s)
        finally:
            self._end(request, FinishReason.ABORT)

    async def _wait(self, request: LiveRequest, deadline_s: float | None) -> None:
        if deadline_s is None:
            await request.changed.wait()
            return
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                await request.changed.wait()
        except TimeoutError as error:
            raise DeadlineError("the deadline of the call passed") from error

    def abort(self, request_id: str) -> bool:
        """Ends a live request; its stream gets terminal deltas. Returns whether there was one."""
        reservation = self._reservations.get(request_id)
        if reservation is not None:
            reservation.abort()
            return True
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._finish_all(request, FinishReason.ABORT)
        self._deliveries.tell(request)
        return True

    def _check_id(self, request_id: str) -> None:
        if request_id in self._requests or request_id in self._reservations:
            raise DuplicateRequestError(
                f"request_id {request_id!r} belongs to a live request; choose another"
            )

    def _check_executor(self) -> None:
        if self._absence.is_too_long:
            raise self._absence.error()

    def _check_queue(self, num_new: int) -> None:
        waiting = self.scheduler.num_waiting + self._num_reserved_seqs
        if waiting + num_new > self._limits.max_queued_requests:
            raise QueueFullError(
                f"{waiting} sequences wait already, the limit is "
                f"{self._limits.max_queued_requests}; try again later",
                self._RETRY_AFTER_S,
            )

    def _check_prompt_length(self, num_prompt: int) -> None:
        longest = self.max_model_len
        if num_prompt >= longest:
            raise InvalidFieldError(
                "prompt",
                f"the prompt has {num_prompt} tokens, but at most {longest - 1} leave room for "
                "an output token",
            )

    def _new_sequences(self, spec: GenerateSpec, prompt_token_ids: list[int]) -> list[Sequence]:
        num_prompt = len(prompt_token_ids)
        max_total = self._max_total_tokens(num_prompt, spec.max_tokens)
        arrival_s = time.monotonic()
        return [
            Sequence(
                next(self._sequence_ids),
                prompt_token_ids,
                max_total_tokens=max_total,
                min_total_tokens=num_prompt + spec.min_tokens,
                sampling=sampling,
                stop_token_ids=spec.stop_token_ids,
                priority=spec.priority,
                arrival_s=arrival_s,
                cache_salt=spec.cache_salt,
            )
            for sampling in spec.samplings
        ]

    def _max_total_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        if max_tokens is not None:
            return min(num_prompt_tokens + max_tokens, self.max_model_len)
        capacity = self.scheduler.capacity
        if capacity is None:
            return self.max_model_len
        # Without a limit of its own, a request is content with what the cache can hold.
        holds = min(self.max_model_len, capacity.max_kv_tokens + 1)
        return max(holds, num_prompt_tokens + 1)

    def _new_completion(self, spec: GenerateSpec, index: int, seq: Sequence) -> Completion:
        detokenizer = None
        if spec.detokenize:
            skip = spec.skip_special_tokens
            detokenizer = IncrementalDetokenizer(
                lambda ids: self._tokenizer.decode(ids, skip_special_tokens=skip), seq.token_ids
            )
        matcher = None
        if spec.stop:
            matcher = StopMatcher(spec.stop, include_in_output=spec.include_stop_str_in_output)
        return Completion(
            index,
            seq,
            detokenizer,
            matcher,
            min_tokens=spec.min_tokens,
            include_stop_token=spec.include_stop_str_in_output,
        )

    def _end(self, request: LiveRequest, reason: FinishReason) -> None:
        """Forgets a request; whatever of it still runs ends for `reason`."""
        self._finish_all(request, reason)
        if self._requests.get(request.request_id) is request:
            del self._requests[request.request_id]
        self._update_idle()

    def _update_idle(self) -> None:
        if not self._requests and not self._reservations:
            self._idle.set()

    def _on_finished(self, completion: Completion) -> None:
        self._owners.pop(completion.seq.seq_id, None)
        record_finished(self._metrics, completion)

    def _finish_all(self, request: LiveRequest, reason: FinishReason) -> None:
        for completion in request.completions:
            if not completion.seq.is_finished:
                self.scheduler.finish(completion.seq, reason)
                self._on_finished(completion)
        self._plan_soon()

    def _fail(self, request: LiveRequest, error: RequestError) -> None:
        request.error = error
        self._finish_all(request, FinishReason.ERROR)
        self._deliveries.tell(request)

    def _never_fits(self, seq: Sequence) -> NeverFitsError:
        capacity = self.scheduler.capacity
        if seq.num_tokens >= self.max_model_len:
            return NeverFitsError(
                f"the sequence has {seq.num_tokens} tokens, but the executor takes less than "
                f"{self.max_model_len}; send less, or give the executor a larger model length"
            )
        holds = capacity.max_kv_tokens if capacity else 0
        return NeverFitsError(
            f"prompt and max_tokens need {seq.max_kv_tokens} tokens of KV cache, but it holds "
            f"{holds}; send less, lower max_tokens, or give the executor more KV memory"
        )

    # The executor link

    def on_connected(self, capacity: ExecutorCapacity, send: SendPlan) -> None:
        """A session is open: all slots are free, the cache is empty."""
        self._absence.end()
        if self._had_session:
            self._metrics.executor_restarts.inc()
        self._had_session = True
        self._send = send
        for seq in self.scheduler.attach(capacity):
            owner = self._owners.get(seq.seq_id)
            if owner is None:
                continue  # ended below, with another completion of its request
            request, _ = owner
            # The limit was made for another executor, or before there was any.
            seq.max_total_tokens = self._max_total_tokens(seq.num_prompt_tokens, request.max_tokens)
            if seq.num_tokens >= seq.max_total_tokens or not self.scheduler.fits(seq):
                self._fail(request, self._never_fits(seq))
        self._plan_soon()

    def on_disconnected(self, problem: str) -> None:
        """The session is over. Running requests wait for the next one."""
        self._absence.problem = problem
        if self._send is None:
            return
        self._send = None
        self.scheduler.detach()
        limit = self._limits.max_executor_losses
        for request in list(self._requests.values()):
            for completion in request.completions:
                # Ended by a result whose successor broke the protocol, which ended the session.
                if completion.seq.is_finished and completion.seq.seq_id in self._owners:
                    self._on_finished(completion)
                    self._deliveries.tell(request)
            if any(
                not completion.seq.is_finished and completion.seq.num_executor_losses > limit
                for completion in request.completions
            ):
                message = f"the executor was lost more than {limit} times during this request"
                self._fail(request, ExecutorFailedError(message))
        self._absence.begin()

    def on_results(self, results: Iterable[StepResult]) -> None:
        """Takes in results in order. Raises ExecutorProtocolError."""
        now_s = time.monotonic()
        token_counts: dict[SequenceId, int] = {}
        for result in results:
            progressed, num_tokens = self.scheduler.update(result)
            if num_tokens:
                self._metrics.iteration_tokens.observe(num_tokens)
            for seq in progressed:
                token_counts[seq.seq_id] = token_counts.get(seq.seq_id, 0) + 1
                _, completion = self._owners[seq.seq_id]
                if completion.stop_matcher is not None and completion.match_stop_strings():
                    self.scheduler.finish(seq, FinishReason.STOP)
                    seq.finish_reason = FinishReason.STOP
        for seq_id, count in token_counts.items():
            request, completion = self._owners[seq_id]
            record_tokens(self._metrics, completion, count, now_s)
            if completion.seq.is_finished:
                self._on_finished(completion)
            self._deliveries.tell(request)
        self._plan_now()

    # Planning

    def _plan_soon(self) -> None:
        """Plans once after everything that arrived in this turn of the event loop."""
        if not self._plan_scheduled and self._send is not None:
            self._plan_scheduled = True
            asyncio.get_running_loop().call_soon(self._plan_now)

    def _plan_now(self) -> None:
        self._plan_scheduled = False
        if self._send is None:
            return
        while (plan := self.scheduler.schedule(time.monotonic())) is not None:
            self._send(plan)

    def _on_executor_absent_for_too_long(self) -> None:
        for request in list(self._requests.values()):
            # One that is finished lacks nothing but a reader that takes its last deltas.
            if not request.is_finished:
                self._fail(request, self._absence.error())
