"""Several schedulers, each with a timed executor, on a virtual clock. Deterministic."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from benchmarks.routing.strategies import Strategy
from benchmarks.routing.timed_executor import TimedExecutor, TimeModel
from benchmarks.routing.working_set import WorkingSet
from benchmarks.routing.workloads import Conversation, Workload
from scheduler_service.executors.fleet import Fleet
from scheduler_service.executors.member import Member
from scheduler_service.router import ExecutorIndex, RoutingPolicy
from scheduler_service.scheduler import ExecutorCapacity, SchedulerPolicy, SchedulerStats
from scheduler_service.sequence import Sequence, SequenceId, SlotSampling


@dataclass(frozen=True, slots=True)
class Hardware:
    """Executors, all alike."""

    num_executors: int
    capacity: ExecutorCapacity
    time_model: TimeModel

    def as_one(self) -> "Hardware":
        """One executor with the cache, the slots and the speed of all."""
        count, capacity = self.num_executors, self.capacity
        return Hardware(
            num_executors=1,
            capacity=ExecutorCapacity(
                num_blocks=capacity.num_blocks * count,
                block_size=capacity.block_size,
                max_num_seqs=capacity.max_num_seqs * count,
                max_num_batched_tokens=capacity.max_num_batched_tokens * count,
                max_model_len=capacity.max_model_len,
            ),
            time_model=self.time_model.times_as_fast(count),
        )


@dataclass(slots=True)
class Outcome:
    """What a run measured; its times are virtual."""

    stats: SchedulerStats = field(default_factory=SchedulerStats)
    num_output_tokens: int = 0
    duration_s: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    # Most sequences that a chosen executor had beyond the one with the fewest.
    max_imbalance: int = 0
    # Mean tokens of the conversations under way, common ones counted once.
    working_set_tokens: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that were found in a prefix cache."""
        return self.stats.prefix_hit_tokens / self.stats.prefix_queried_tokens

    @property
    def output_tokens_per_s(self) -> float:
        """Output tokens over the time from the first arrival to the last end."""
        return self.num_output_tokens / self.duration_s


@dataclass(frozen=True, slots=True)
class _Request:
    conversation: Conversation
    # Index of the turn.
    turn: int
    due_s: float


class Simulation:
    """Serves one workload with one strategy."""

    def __init__(self, hardware: Hardware, routing: RoutingPolicy, strategy: Strategy) -> None:
        self._strategy = strategy
        self._fleet = Fleet(SchedulerPolicy(), routing)
        self._executors: dict[ExecutorIndex, TimedExecutor] = {}
        for number in range(hardware.num_executors):
            member = self._fleet.join(f"executor-{number}")
            member.scheduler.attach(hardware.capacity)
            self._executors[member.index] = TimedExecutor(hardware.capacity, hardware.time_model)
        # The number keeps what is due at the same time in the order in which it was made.
        self._due: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_events = 0
        self._num_sequences = 0
        self._requests: dict[SequenceId, _Request] = {}
        self._working_set = WorkingSet()
        self._outcome = Outcome()

    def run(self, workload: Workload) -> Outcome:
        """Serves all requests."""
        for conversation in workload.conversations:
            first = _Request(conversation, 0, conversation.start_s)
            self._at(first.due_s, partial(self._arrive, first))
        now_s = 0.0
        while self._due:
            now_s, _, event = heapq.heappop(self._due)
            event(now_s)
        self._outcome.stats = self._fleet.stats
        self._outcome.duration_s = now_s - workload.conversations[0].start_s
        self._outcome.working_set_tokens = self._working_set.mean_tokens
        return self._outcome

    def _at(self, time_s: float, event: Callable[[float], None]) -> None:
        heapq.heappush(self._due, (time_s, self._num_events, event))
        self._num_events += 1

    def _arrive(self, request: _Request, now_s: float) -> None:
        conversation = request.conversation
        turn = conversation.turns[request.turn]
        self._working_set.arrive(conversation, turn.num_tokens, now_s)
        seq = Sequence(
            SequenceId(self._num_sequences),
            conversation.token_ids[: turn.num_prompt_tokens],
            max_total_tokens=turn.num_tokens,
            sampling=SlotSampling(seed=conversation.seed),
            arrival_s=now_s,
        )
        self._num_sequences += 1
        self._requests[seq.seq_id] = request
        fewest = min(member.num_live for member in self._fleet.members)
        member = self._strategy.send(seq, self._fleet)
        imbalance = member.num_live - 1 - fewest
        self._outcome.max_imbalance = max(self._outcome.max_imbalance, imbalance)
        self._go_on(member, now_s)

    def _go_on(self, member: Member, now_s: float) -> None:
        """Plans, and has the executor begin what there is if it is idle."""
        executor = self._executors[member.index]
        plan = member.scheduler.schedule(now_s)
        if plan is not None:
            executor.plans.append(plan)
        if executor.is_busy:
            return
        duration_s = executor.begin()
        if duration_s is not None:
            self._at(now_s + duration_s, partial(self._end_iteration, member))

    def _end_iteration(self, member: Member, now_s: float) -> None:
        progressed, _ = member.scheduler.update(self._executors[member.index].end())
        for seq in progressed:
            request = self._requests[seq.seq_id]
            if seq.num_output_tokens == 1:
                self._outcome.ttft_s.append(now_s - request.due_s)
            if seq.is_finished:
                del self._requests[seq.seq_id]
                self._outcome.num_output_tokens += seq.num_output_tokens
                self._expect_next(request, now_s)
        self._go_on(member, now_s)

    def _expect_next(self, request: _Request, now_s: float) -> None:
        turns = request.conversation.turns
        index = request.turn + 1
        if index < len(turns):
            due_s = now_s + turns[index].think_time_s
            following = _Request(request.conversation, index, due_s)
            self._at(due_s, partial(self._arrive, following))
        else:
            self._working_set.end(request.conversation, now_s)
