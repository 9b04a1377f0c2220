"""The engine: joins requests and the pool of executors on one event loop.

Everything here runs on that loop, so nothing is locked. Servicers submit requests and wait for
deltas; the pool reports sessions and results, and makes the plans.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from scheduler_service.admission import Admission, AdmissionLimits
from scheduler_service.completion import Completion, Delta
from scheduler_service.delivery import DeliveryQueue
from scheduler_service.errors import (
    DeadlineError,
    DuplicateRequestError,
    ExecutorFailedError,
    NoExecutorError,
    RequestError,
    SupersededError,
)
from scheduler_service.executors.member import Member
from scheduler_service.executors.pool import ExecutorPool
from scheduler_service.lengths import SequenceLengths
from scheduler_service.live_request import LiveRequest, RequestFactory
from scheduler_service.model_spec import ModelSpec
from scheduler_service.plan import StepResult
from scheduler_service.reservation import Reservation
from scheduler_service.sequence import FinishReason, Sequence, SequenceId
from scheduler_service.telemetry.request_metrics import EngineMetrics
from scheduler_service.text.tokenizer import Tokenizer
from scheduler_service.validation import GenerateSpec, RequestKey

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """Bounds that protect the process and its callers."""

    admission: AdmissionLimits
    max_executor_losses: int


class Engine:
    """Owns every live request."""

    def __init__(
        self,
        pool: ExecutorPool,
        model: ModelSpec,
        tokenizer: Tokenizer,
        metrics: EngineMetrics,
        limits: EngineLimits,
    ) -> None:
        self.pool = pool
        pool.listener = self
        self.model = model
        self._metrics = metrics
        self._limits = limits
        self._lengths = SequenceLengths(model, pool.load)
        self.admission = Admission(limits.admission, pool.load, self._lengths)
        self._factory = RequestFactory(tokenizer, self._lengths)
        self._requests: dict[RequestKey, LiveRequest] = {}
        self._reservations: dict[RequestKey, Reservation] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._owners: dict[SequenceId, tuple[LiveRequest, Completion]] = {}
        self._deliveries = DeliveryQueue()
        # What new requests are told while none are taken.
        self._refusal: RequestError | None = None

    @property
    def max_model_len(self) -> int:
        """Longest sequence: the model's own limit, or the largest executor's if that is less."""
        return self._lengths.max_model_len

    # Requests

    @contextmanager
    def reserve(self, spec: GenerateSpec, client: str = "") -> Iterator[Reservation]:
        """Holds the request's id and its place in the queue while its prompt is tokenized.

        `client` is whose request it is for the limits of each client. Raises RequestError if the id
        is taken or the request costs more than is left.
        """
        if self._refusal is not None:
            # Without the frames of those who were told before.
            raise self._refusal.with_traceback(None)
        self._check_id(spec)
        self._check_executor()
        ticket = self.admission.reserve(spec, client)
        reservation = Reservation(spec, ticket)
        self._reservations[spec.key] = reservation
        self._idle.clear()
        try:
            yield reservation
        finally:
            if self._reservations.get(spec.key) is reservation:
                del self._reservations[spec.key]
            if not reservation.is_submitted:
                ticket.release()
            self._update_idle()

    def submit(self, reservation: Reservation, prompt_token_ids: list[int]) -> LiveRequest:
        """Queues a request whose reservation is held; one that was aborted meanwhile is over.

        Raises RequestError and keeps nothing if it is refused.
        """
        spec = reservation.spec
        if reservation.error is not None:
            raise reservation.error
        if not reservation.is_aborted:
            self._check_executor()
            self._lengths.check_prompt(len(prompt_token_ids))
        seqs = self._factory.sequences(reservation, prompt_token_ids)
        if not reservation.is_aborted:
            longest = max(seqs.values(), key=lambda seq: seq.num_tokens)
            if longest.num_tokens >= longest.max_total_tokens or not self.pool.fits(longest):
                raise self._lengths.never_fits(longest)
            self.admission.check_queue(spec, longest.max_total_tokens)
        request = self._factory.request(reservation, seqs)
        reservation.is_submitted = True
        request.ticket.submitted()
        self._requests[request.key] = request
        for completion in request.completions:
            self._owners[completion.seq.seq_id] = (request, completion)
        self.pool.add([completion.seq for completion in request.completions])
        for completion in request.completions:
            if completion.has_stop_match:
                # What the client has received ends in a stop string, which it was not told.
                self.pool.finish(completion.seq, FinishReason.STOP)
                self._on_finished(completion)
        if reservation.is_aborted:
            self._finish_all(request, FinishReason.ABORT)
        return request

    def refuse_new(self, error: RequestError | None) -> None:
        """Refuses requests with an error from now on; None: takes them again."""
        self._refusal = error

    def fail_all(self, error: RequestError) -> None:
        """Ends everything that is live or being tokenized."""
        for reservation in self._reservations.values():
            reservation.fail(error)
        for request in list(self._requests.values()):
            if not request.is_finished:
                self._fail(request, error)

    def live_requests(self) -> list[LiveRequest]:
        """Requests whose prompts are tokenized, oldest first."""
        return list(self._requests.values())

    def reservations(self) -> list[Reservation]:
        """Requests whose prompts are being tokenized, oldest first."""
        return list(self._reservations.values())

    def flush_prefix_cache(self) -> int:
        """Forgets the cached prefixes that no sequence uses; returns how many blocks that frees."""
        return self.pool.drop_prefixes()

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
                for delta in self.new_deltas(request):
                    yield delta
                if request.is_answered:
                    return
                await self._wait(request, deadline_s)
        finally:
            self.end(request)

    def new_deltas(self, request: LiveRequest) -> Iterator[Delta]:
        """Takes what is new of each completion. Raises RequestError if the request failed."""
        if request.error is not None:
            raise request.error
        for completion in request.completions:
            delta = completion.take_delta()
            if delta is not None:
                yield delta

    async def _wait(self, request: LiveRequest, deadline_s: float | None) -> None:
        if deadline_s is None:
            await request.changed.wait()
            return
        try:
            async with asyncio.timeout(deadline_s - time.monotonic()):
                await request.changed.wait()
        except TimeoutError as error:
            raise _deadline_error() from error

    def expire(self, request: LiveRequest) -> None:
        """Ends a request whose deadline has passed as `deltas` would, with the same error."""
        request.error = _deadline_error()
        self._finish_all(request, FinishReason.ABORT)
        self._tell(request)

    def abort(self, request_id: str, owner: str = "") -> bool:
        """Ends a live request; its stream gets terminal deltas. Returns whether there was one."""
        key = RequestKey(request_id, owner)
        reservation = self._reservations.get(key)
        if reservation is not None:
            reservation.abort()
            return True
        request = self._requests.get(key)
        if request is None:
            return False
        self._finish_all(request, FinishReason.ABORT)
        self._tell(request)
        return True

    def check_arrival(self, key: RequestKey, client: str, priority: int) -> None:
        """Refuses what has no chance, before the request is looked at any closer.

        Raises RequestError.
        """
        self._check_executor()
        # A live id is for `reserve` to judge: a request that resumes takes its own place.
        if key not in self._requests and key not in self._reservations:
            self.admission.check_arrival(client, priority)

    def _check_id(self, spec: GenerateSpec) -> None:
        live = self._requests.get(spec.key)
        reservation = self._reservations.get(spec.key)
        held = []
        if live is not None:
            held.append(live.resume)
        if reservation is not None:
            held.append(reservation.spec.resume)
        if any(resume is None or not resume.is_same_request(spec.resume) for resume in held):
            raise DuplicateRequestError(
                f"request_id {spec.request_id!r} belongs to a live request; choose another"
            )
        # The client has given up the older call, which may not have noticed.
        error = SupersededError("another call resumed the request")
        if live is not None:
            self._fail(live, error)
        if reservation is not None:
            reservation.fail(error)

    def _check_executor(self) -> None:
        refusal = self.pool.refusal()
        if refusal is not None:
            raise refusal

    def end(self, request: LiveRequest) -> None:
        """Forgets a request that nobody waits for; whatever of it still runs is aborted."""
        self._finish_all(request, FinishReason.ABORT)
        if self._requests.get(request.key) is request:
            del self._requests[request.key]
        request.ticket.release()
        self._update_idle()

    def _update_idle(self) -> None:
        if not self._requests and not self._reservations:
            self._idle.set()

    def _on_finished(self, completion: Completion) -> None:
        request, _ = self._owners.pop(completion.seq.seq_id)
        completion.finished_s = time.monotonic()
        seq = completion.seq
        ran_to_its_end = seq.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        if ran_to_its_end and seq.first_admitted_s is not None:
            self.admission.observe_service_time(completion.finished_s - seq.first_admitted_s)
        self._metrics.on_finished(completion)
        if not any(each.seq.seq_id in self._owners for each in request.completions):
            self._metrics.on_request_finished(request.completions, request.max_tokens)

    def _finish_all(self, request: LiveRequest, reason: FinishReason) -> None:
        for completion in request.completions:
            if not completion.seq.is_finished:
                self.pool.finish(completion.seq, reason)
                self._on_finished(completion)

    def _fail(self, request: LiveRequest, error: RequestError) -> None:
        request.error = error
        self._finish_all(request, FinishReason.ERROR)
        self._tell(request)

    def _tell(self, request: LiveRequest) -> None:
        """Lets whoever answers a request know that there may be something new."""
        if request.group is None:
            self._deliveries.tell(request)
        else:
            request.group.note(request)
            self._deliveries.tell(request.group)

    # What the pool tells

    def on_limits_changed(self, unsettled: Iterable[Sequence]) -> None:
        """Other executors take sequences; see `PoolListener`."""
        for seq in unsettled:
            # The limit was made for another executor, or before there was any.
            request, _ = self._owners[seq.seq_id]
            seq.max_total_tokens = self._lengths.max_total_tokens(
                seq.num_prompt_tokens, request.max_tokens
            )

    def on_displaced(self, seqs: Iterable[Sequence], *, is_loss: bool) -> None:
        """Running sequences wait for another executor, or for the same one to return."""
        now_s = time.monotonic()
        for seq in seqs:
            seq.num_executor_losses += is_loss
            if seq.history is not None:
                seq.history.executor_lost(now_s)
        if not self.pool.load.is_connected:
            self.admission.on_executor_lost()
        limit = self._limits.max_executor_losses
        for request in list(self._requests.values()):
            for completion in request.completions:
                # Ended by a result whose successor broke the protocol, which ended the session.
                if completion.seq.is_finished and completion.seq.seq_id in self._owners:
                    self._on_finished(completion)
                    self._tell(request)
            if any(
                not completion.seq.is_finished and completion.seq.num_executor_losses > limit
                for completion in request.completions
            ):
                message = f"the executor was lost more than {limit} times during this request"
                self._fail(request, ExecutorFailedError(message))

    def on_stranded(self, seqs: Iterable[Sequence], error: NoExecutorError | None) -> None:
        """Nobody will run these sequences; None: because no executor is large enough."""
        for seq in seqs:
            if not seq.is_finished:  # above, with another completion of its request
                request, _ = self._owners[seq.seq_id]
                self._fail(request, error or self._lengths.never_fits(seq))

    def on_planned(self) -> None:
        """Plans were made."""
        self.admission.observe_plan(time.monotonic())

    def on_results(self, member: Member, results: Iterable[StepResult]) -> None:
        """Takes in an executor's results in order. Raises ExecutorProtocolError."""
        scheduler = member.scheduler
        now_s = time.monotonic()
        token_counts: dict[SequenceId, int] = {}
        progress: list[tuple[int, list[Sequence]]] = []
        for result in results:
            progressed, num_tokens = scheduler.update(result)
            progress.append((result.iteration, progressed))
            if num_tokens:
                self._metrics.on_iteration(num_tokens)
            for seq in progressed:
                token_counts[seq.seq_id] = token_counts.get(seq.seq_id, 0) + 1
                _, completion = self._owners[seq.seq_id]
                if completion.stop_matcher is not None and completion.match_stop_strings():
                    scheduler.finish(seq, FinishReason.STOP)
                    seq.finish_reason = FinishReason.STOP
        owners = [self._owners[seq_id] for seq_id in token_counts]
        for _, completion in owners:
            if completion.seq.history is not None:
                completion.note_iterations(completion.seq.history, progress)
        completions = (completion for _, completion in owners)
        self._metrics.on_tokens(zip(completions, token_counts.values(), strict=True), now_s)
        for request, completion in owners:
            if completion.first_token_s is None:
                completion.first_token_s = now_s
            completion.last_token_s = now_s
            if completion.seq.is_finished:
                self._on_finished(completion)
            self._tell(request)


def _deadline_error() -> DeadlineError:
    return DeadlineError("the deadline of the call passed")
