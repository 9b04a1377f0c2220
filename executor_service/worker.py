"""The worker thread: applies plans and launches iterations, one after the other.

It alone touches the device and the slots. While a slot can decode it never waits for a plan.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from executor_service.batch_state import FINISH_NONE, FINISH_NOT_RUN, BatchState
from executor_service.metrics import ExecutorMetrics, StepKind, StepRecord
from executor_service.plan_reader import PlanError, PlanOrder
from executor_service.runner import PendingStep, Runner, StepOutput
from executor_service.session import EndReason, Session
from executor_service.slots import Chunk, SlotTable
from nanovllm.logs import fields
from nanovllm.v1 import executor_pb2
from nanovllm.wire import pack_float32, pack_int32

logger = logging.getLogger(__name__)

_UINT32_MAX = 2**32 - 1
# How often to look whether an iteration has ended while nothing can be launched behind it.
_POLL_S = 0.0002


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A new session takes over; the one before it is fenced."""

    session: Session


@dataclass(frozen=True, slots=True)
class QueuedPlan:
    """A plan of a session."""

    session: Session
    plan: PlanOrder
    received_s: float


@dataclass(frozen=True, slots=True)
class CloseSession:
    """The session's stream is gone."""

    session: Session


@dataclass(frozen=True, slots=True)
class Stop:
    """The thread ends."""


@dataclass(frozen=True, slots=True)
class _Launched:
    """An iteration that was launched, with what it needs to be reported."""

    pending: PendingStep
    session: Session
    iteration: int
    applied_step_id: int
    kind: StepKind
    num_sequences: int
    num_chunk_tokens: int
    # Rows that sample because their prefill ends; the others decode.
    num_completed: int
    # Owner of each slot at launch; results of a former owner must not touch the next one.
    generations: dict[int, int]
    # Whether a slot could have run since the end of the iteration before.
    counts_idle: bool


Command = OpenSession | QueuedPlan | CloseSession | Stop


class Worker:
    """Runs until `stop`. `on_fatal` is called if the device is beyond repair."""

    def __init__(
        self,
        runner: Runner,
        state: BatchState,
        metrics: ExecutorMetrics,
        on_fatal: Callable[[], None],
    ) -> None:
        self._runner = runner
        self._state = state
        self._metrics = metrics
        self._on_fatal = on_fatal
        self._slots = SlotTable(state.limits)
        self._session: Session | None = None
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        # Plans that wait for the iteration that runs the chunks of the plan before them.
        self._plans: deque[QueuedPlan] = deque()
        self._iteration = 0
        self._launched: deque[_Launched] = deque()
        # Whether there was work for the device when the last iteration was launched or collected.
        self._had_work = False
        # Plans were applied that left nothing to run. The scheduler is told that they arrived, once
        # the iterations launched before them are reported.
        self._owes_report = False
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    @property
    def has_session(self) -> bool:
        """Whether a session is open; from any thread."""
        return self._session is not None

    @property
    def num_active_slots(self) -> int:
        """Slots with an owner; from any thread."""
        return self._slots.num_occupied

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Ends the thread after the iteration under way; returns whether it ended in time."""
        self._commands.put(Stop())
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def submit(self, command: Command) -> None:
        """Queues a command; from any thread."""
        self._commands.put(command)

    def _run(self) -> None:
        try:
            while self._work():
                pass
            self._end_session(EndReason.SHUTDOWN, "the executor is shutting down")
        except Exception:
            # The device is beyond repair; without this thread the process must not look alive.
            logger.exception("the worker failed")
            self._on_fatal()

    def _work(self) -> bool:
        """Takes commands and has one turn; returns False when the thread is to end."""
        can_launch = bool(self._plans or self._slots.runnable())
        try:
            # It looks at what was launched, which may have failed.
            if not self._take_commands(wait=not can_launch):
                return False
            self._turn()
        except PlanError as error:
            logger.warning(
                "plan refused", extra=fields(session_id=f"{self._session_id():x}", problem=error)
            )
            self._end_session(EndReason.PROTOCOL, str(error))
        except Exception as error:
            logger.exception("an iteration failed")
            # First, because a broken device makes the clean-up fail as well.
            self._on_fatal()
            self._end_session(EndReason.FAILED, f"an iteration failed: {type(error).__name__}")
        return True

    def _take_commands(self, *, wait: bool) -> bool:
        """Takes every queued command; returns False when the thread is to end.

        With `wait` at least one, unless the oldest iteration ends before it comes.
        """
        while True:
            command = self._next_command(wait=wait)
            wait = False
            match command:
                case None:
                    return True
                case Stop():
                    return False
                case OpenSession(session):
                    self._end_session(EndReason.FENCED, "a newer session took over")
                    self._session = session
                    self._iteration = 0
                    session.open()
                case CloseSession(session):
                    if session is self._session:
                        self._end_session(EndReason.CLOSED, "the stream was closed")
                case QueuedPlan(session):
                    if session is self._session:
                        self._plans.append(command)

    def _next_command(self, *, wait: bool) -> Command | None:
        while True:
            # A plan may come while iterations run, and wants to be launched behind them.
            block = wait and not self._oldest_has_ended()
            try:
                return self._commands.get(block, timeout=_POLL_S if self._launched else None)
            except queue.Empty:
                if not block:
                    return None

    def _oldest_has_ended(self) -> bool:
        return bool(self._launched) and self._launched[0].pending.has_ended()

    def _turn(self) -> None:
        """Applies plans up to one with chunks, then runs one iteration if there is work."""
        applied = False
        chunks: list[Chunk] = []
        while self._plans and not chunks:
            chunks = self._apply(self._plans.popleft())
            applied = True
        decode_slots = self._slots.runnable()
        idle = not (chunks or decode_slots)
        if not idle:
            self._launch(chunks, decode_slots)
        self._owes_report = idle and (applied or self._owes_report)
        if len(self._launched) > self._runner.pipeline_depth or (idle and self._oldest_has_ended()):
            self._collect()
        elif idle:
            # A plan took the work away, so the device may rest.
            self._had_work = False
        if self._owes_report and not self._launched and self._session is not None:
            self._session.put(executor_pb2.StepResult(applied_step_id=self._slots.applied_step_id))
            self._owes_report = False

    def _apply(self, queued: QueuedPlan) -> list[Chunk]:
        plan = queued.plan
        chunks = self._slots.apply(plan)
        if plan.releases:
            self._state.release(plan.releases)
        if plan.admits:
            self._state.admit(plan.admits)
        if plan.grants:
            slots, blocks = zip(*plan.grants, strict=True)
            starts = [self._slots[slot].num_blocks - len(new) for slot, new in plan.grants]
            self._state.grant(list(slots), starts, list(blocks))
        self._metrics.plan_queue_delay.observe(time.monotonic() - queued.received_s)
        return chunks

    def _launch(self, chunks: list[Chunk], decode_slots: list[int]) -> None:
        if self._session is None:
            return
        pending = self._runner.launch(chunks, decode_slots, self._slots)
        self._iteration += 1
        for slot in decode_slots:
            self._slots.advance(slot)
        completed = [chunk.slot for chunk in chunks if chunk.completes]
        for slot in completed:
            self._slots.complete_prefill(slot)
        self._launched.append(
            _Launched(
                pending=pending,
                session=self._session,
                iteration=self._iteration,
                applied_step_id=self._slots.applied_step_id,
                kind=_kind(chunks, decode_slots),
                num_sequences=len(chunks) + len(decode_slots),
                num_chunk_tokens=sum(chunk.num_tokens for chunk in chunks),
                num_completed=len(completed),
                generations={
                    slot: self._slots[slot].generation for slot in completed + decode_slots
                },
                counts_idle=self._had_work,
            )
        )
        self._had_work = True

    def _collect(self) -> None:
        """Waits for the oldest iteration and reports it."""
        launched = self._launched.popleft()
        output = launched.pending.collect()
        finished_s = time.monotonic()
        for slot, flag in zip(output.slots, output.finish_flags, strict=True):
            state = self._slots.get(slot)
            if state is not None and state.generation == launched.generations[slot]:
                state.finished = state.finished or flag != FINISH_NONE
        idle_s = output.idle_s if launched.counts_idle else 0.0
        result = _to_result(output)
        result.iteration = launched.iteration
        result.applied_step_id = launched.applied_step_id
        result.gpu_time_us = _microseconds(output.busy_s)
        result.idle_time_us = _microseconds(idle_s)
        self._metrics.record_step(
            StepRecord(
                kind=launched.kind,
                num_sequences=launched.num_sequences,
                # A row that ends its prefill counts with its chunk; of the others each is a token.
                num_tokens=launched.num_chunk_tokens
                + len(result.finish_flags)
                - launched.num_completed,
                busy_s=output.busy_s,
                idle_s=idle_s,
                from_graph=output.from_graph,
            )
        )
        launched.session.put(result, finished_s)
        self._had_work = bool(self._plans or self._launched or self._slots.runnable())

    def _end_session(self, reason: EndReason, message: str) -> None:
        """Frees all slots; whoever holds the session is told why."""
        if self._session is not None:
            self._session.end(reason, message)
            self._session = None
        # Results of launched iterations have nobody to go to. What follows is ordered behind them
        # on the device.
        self._launched.clear()
        self._slots.clear()
        self._state.clear()
        self._plans.clear()
        self._owes_report = False
        self._had_work = False

    def _session_id(self) -> int:
        return self._session.session_id if self._session is not None else 0


def _microseconds(seconds: float) -> int:
    # A process that was suspended for more than an hour must not fail for that.
    return min(int(seconds * 1e6), _UINT32_MAX)


def _kind(chunks: list[Chunk], decode_slots: list[int]) -> StepKind:
    if not chunks:
        return StepKind.DECODE
    return StepKind.MIXED if decode_slots else StepKind.PREFILL


def _to_result(output: StepOutput) -> executor_pb2.StepResult:
    ran = [flag != FINISH_NOT_RUN for flag in output.finish_flags]
    result = executor_pb2.StepResult(
        slots=pack_int32(_pick(output.slots, ran)),
        token_ids=pack_int32(_pick(output.token_ids, ran)),
        finish_flags=bytes(_pick(output.finish_flags, ran)),
    )
    if output.logprobs:
        result.logprobs.CopyFrom(
            executor_pb2.SlotLogprobs(
                slots=pack_int32([item.slot for item in output.logprobs]),
                chosen=pack_float32([item.chosen for item in output.logprobs]),
                num_top=pack_int32([len(item.top_token_ids) for item in output.logprobs]),
                top_token_ids=pack_int32(
                    [token for item in output.logprobs for token in item.top_token_ids]
                ),
                top_logprobs=pack_float32(
                    [value for item in output.logprobs for value in item.top_logprobs]
                ),
            )
        )
    return result


def _pick(values: list[int], keep: list[bool]) -> list[int]:
    return [value for value, kept in zip(values, keep, strict=True) if kept]
