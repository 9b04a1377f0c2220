"""The scheduling policy: which sequence computes what, and who owns which KV block.

Pure: no I/O, no logging, and the only clock is the `now_s` that callers pass in.

The executor decodes on its own as long as a slot has room in its granted blocks, so the scheduler
works ahead of it. Two facts make that safe:

* Plans are applied in order, each before the iteration that follows it. A block or slot may be
  given away in the very plan that releases it.
* A plan's prefill chunks run before any later plan is applied. KV that a plan computes is
  therefore there for whoever a later plan, or the same one, admits onto it, and full prompt blocks
  can be shared from the moment their computation is planned.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from scheduler_service.block_manager import (
    BlockHash,
    BlockId,
    BlockManager,
    PrefixListener,
    StoredBlock,
)
from scheduler_service.plan import (
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_STOP_TOKEN,
    Admit,
    Plan,
    StepResult,
)
from scheduler_service.sequence import (
    FinishReason,
    Sequence,
    SequenceId,
    SequenceStateError,
    SequenceStatus,
    SlotId,
    StepId,
)
from scheduler_service.waiting_queue import WaitingQueue

_FINISH_REASONS = {FINISH_STOP_TOKEN: FinishReason.STOP, FINISH_LENGTH: FinishReason.LENGTH}


class ExecutorProtocolError(ValueError):
    """The executor reported something that cannot follow from the plans it was sent."""


@dataclass(frozen=True, slots=True)
class SchedulerPolicy:
    """Settings that are a matter of taste rather than of capacity."""

    # Tokens of KV room that a decoding sequence is kept ahead, so that it never pauses for a grant.
    # Where blocks are not plentiful it is less: a quarter of those available, in equal shares.
    lookahead_tokens: int = 128
    # Share of the blocks that admissions and lookahead leave alone, so that running sequences can
    # grow for a while before anything is preempted.
    watermark_ratio: float = 0.01
    # Seconds of waiting that weigh as much as one level of priority.
    priority_aging_s: float = 30.0
    # Plans with prefill chunks that may be on their way. Two keep the executor busy: one runs, the
    # next is already there. More would only delay the policy's reaction to new arrivals.
    max_prefill_plans_in_flight: int = 2
    enable_prefix_caching: bool = True


@dataclass(frozen=True, slots=True)
class ExecutorCapacity:
    """What one executor can hold."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    # Names the executor's process in traces.
    executor_epoch: int = field(default=0, compare=False)

    @property
    def max_kv_tokens(self) -> int:
        """Tokens that the whole KV cache holds."""
        return self.num_blocks * self.block_size


@dataclass(slots=True)
class SchedulerStats:
    """Counters since the start."""

    num_preemptions: int = 0
    recomputed_tokens: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0
    # Cost of the sequences that got a slot, counted again each time that one gets another.
    admitted_tokens: int = 0

    def add(self, other: "SchedulerStats") -> None:
        """Counts in what another scheduler counted."""
        self.num_preemptions += other.num_preemptions
        self.recomputed_tokens += other.recomputed_tokens
        self.prefix_queried_tokens += other.prefix_queried_tokens
        self.prefix_hit_tokens += other.prefix_hit_tokens
        self.admitted_tokens += other.admitted_tokens


@dataclass(slots=True)
class _PrefillPlan:
    """A plan with prefill chunks that the executor has not reported yet."""

    step_id: StepId
    num_tokens: int


class Scheduler:
    """Holds every live sequence. Driven by the engine from one thread.

    Without an executor (before `attach`, after `detach`) sequences wait.
    """

    # Lookahead below the watermark: enough to cover one round trip at typical speeds.
    _SCARCE_LOOKAHEAD_TOKENS = 8

    def __init__(self, policy: SchedulerPolicy) -> None:
        self.policy = policy
        self.stats = SchedulerStats()
        self.capacity: ExecutorCapacity | None = None
        self.blocks: BlockManager | None = None
        self._prefix_listener: PrefixListener | None = None
        self._waiting = WaitingQueue(policy.priority_aging_s)
        # Admitted sequences in admission order, by state.
        self._prefilling: dict[SequenceId, Sequence] = {}
        self._decoding: dict[SequenceId, Sequence] = {}
        self._slots: dict[SlotId, Sequence] = {}
        self._free_slots: list[SlotId] = []
        self._pending_releases: list[SlotId] = []
        # Hashes of prompt blocks that an admitted sequence will compute, but in no plan yet.
        self._promised: dict[BlockHash, SequenceId] = {}
        self._prefill_plans: deque[_PrefillPlan] = deque()
        self._last_step_id = StepId(0)
        #: Cost of the running sequences.
        self.num_running_tokens = 0
        #: Whether a sequence would have been admitted but for a free slot or blocks.
        self.is_full = False

    @property
    def num_waiting(self) -> int:
        """Sequences without a slot."""
        return len(self._waiting)

    def num_waiting_tokens(self, min_priority: int | None = None) -> int:
        """Cost of the sequences without a slot, of this priority and above; None: of all."""
        return self._waiting.num_tokens(min_priority)

    @property
    def num_waiting_prompt_tokens(self) -> int:
        """Prompt tokens of the sequences without a slot."""
        return self._waiting.num_prompt_tokens

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return len(self._slots)

    @property
    def kv_usage_ratio(self) -> float:
        """Share of the KV blocks that sequences own."""
        blocks = self.blocks
        return blocks.num_owned / blocks.num_blocks if blocks else 0.0

    @property
    def has_work_in_flight(self) -> bool:
        """Whether the executor owes a result: a prefill, or a decode with room to go on."""
        if self._prefill_plans:
            return True
        return any(self._capacity_tokens(seq) >= seq.num_tokens for seq in self._decoding.values())

    @property
    def num_queued_tokens(self) -> int:
        """Known tokens that no plan computes yet, without those that are expected to be cached."""
        under_way = self._prefilling.values()
        not_planned = sum(seq.num_tokens - seq.num_planned_tokens for seq in under_way)
        return self._waiting.num_uncached_tokens + not_planned

    def attach(self, capacity: ExecutorCapacity) -> None:
        """Starts to plan for an executor whose slots are all free and whose cache is empty.

        What waits may not fit it; see `fits`.
        """
        if self.capacity is not None:
            self.detach()
        self.capacity = capacity
        self.blocks = BlockManager(capacity.num_blocks, capacity.block_size)
        self.listen_to_prefixes(self._prefix_listener)
        self._free_slots = [SlotId(i) for i in range(capacity.max_num_seqs - 1, -1, -1)]
        self._last_step_id = StepId(0)

    def detach(self) -> list[Sequence]:
        """The executor is gone: every running sequence waits again, with all its tokens.

        Returns those that ran.
        """
        displaced = list(self._slots.values())
        for seq in displaced:
            self._unseat(seq)
            self._return_to_queue(seq)
        self.capacity = None
        self.blocks = None
        if self._prefix_listener is not None:
            self._prefix_listener.on_cleared()
        self._pending_releases.clear()
        self._promised.clear()
        self._prefill_plans.clear()
        return displaced

    def listen_to_prefixes(self, listener: PrefixListener | None) -> None:
        """Has `listener` told how the prefix cache changes from now on; None: nobody."""
        self._prefix_listener = listener
        if self.blocks is not None:
            self.blocks.listener = listener

    def fits(self, seq: Sequence) -> bool:
        """Whether the executor could hold the sequence at its full length, alone."""
        capacity = self.capacity
        return capacity is None or (
            seq.max_kv_tokens <= capacity.max_kv_tokens
            and seq.max_total_tokens <= capacity.max_model_len
        )

    def shareable_hashes(self, seq: Sequence, block_size: int) -> list[BlockHash]:
        """Hashes of the blocks that a prefix hit may cover: at least one token stays to compute."""
        if not self.policy.enable_prefix_caching:
            return []
        return seq.block_hashes((seq.num_tokens - 1) // block_size, block_size)

    def add(self, seq: Sequence) -> None:
        """Queues a new sequence, or one that another scheduler gave away."""
        self._waiting.push(seq)

    def live(self) -> Iterator[Sequence]:
        """Every sequence that it holds."""
        yield from self._slots.values()
        yield from self._waiting

    def waiting(self) -> list[Sequence]:
        """Sequences without a slot, the most urgent first."""
        return sorted(self._waiting, key=self._waiting.key)

    def urgency(self, seq: Sequence) -> tuple[float, SequenceId]:
        """Sort key of the queue, the same in every scheduler of one policy; smaller goes first."""
        return self._waiting.key(seq)

    def withdraw(self, seq: Sequence) -> None:
        """Takes a waiting sequence out, for another scheduler. Raises SequenceStateError."""
        if seq.status is not SequenceStatus.WAITING:
            raise SequenceStateError(f"sequence {seq.seq_id} is {seq.status} and cannot move")
        self._waiting.discard(seq)

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """Ends a sequence in any state; from here on it owns nothing. Repeating it does nothing."""
        if seq.is_finished:
            return
        if seq.slot is None:
            self._waiting.discard(seq)
        else:
            self._unseat(seq)
        seq.move_to(SequenceStatus.FINISHED)
        seq.finish_reason = reason

    def schedule(self, now_s: float) -> Plan | None:
        """Makes the next plan, or returns None if there is nothing to say."""
        if self.capacity is None or self.blocks is None:
            return None
        plan = Plan(StepId(self._last_step_id + 1))
        self._grant(plan, self.blocks, now_s)
        if len(self._prefill_plans) < self.policy.max_prefill_plans_in_flight:
            self._prefill(plan, self.blocks, self.capacity, now_s)
        # Preemption above may have added to these.
        plan.releases, self._pending_releases = self._pending_releases, []
        if plan.is_empty:
            return None
        self._last_step_id = plan.step_id
        if plan.chunks:
            num_tokens = sum(count for _, count in plan.chunks)
            self._prefill_plans.append(_PrefillPlan(plan.step_id, num_tokens))
        return plan

    def _grant(self, plan: Plan, blocks: BlockManager, now_s: float) -> None:
        """Keeps every decoding sequence ahead of the executor; preempts where memory is short."""
        grants: dict[SlotId, list[BlockId]] = {}
        lookahead_tokens = self._lookahead_tokens(blocks)
        block_size = blocks.block_size
        for seq in list(self._decoding.values()):
            if seq.slot is None:
                continue  # preempted below, for a sequence before it
            # `_blocks_missing`, written out: nearly all sequences leave here, in every plan.
            room = min(len(seq.token_ids) + lookahead_tokens, seq.max_total_tokens - 1)
            wanted = -(-room // block_size) - len(seq.block_table)
            if wanted <= 0:
                continue
            if blocks.num_available - wanted < self._watermark(blocks):
                wanted = self._blocks_missing(seq, self._SCARCE_LOOKAHEAD_TOKENS, blocks)
                if blocks.num_available < wanted:
                    wanted = self._blocks_missing(seq, 0, blocks)
                while wanted > blocks.num_available and seq.slot is not None:
                    victim = max(self._slots.values(), key=self._waiting.key)
                    if victim.slot is not None:
                        grants.pop(victim.slot, None)
                    self._preempt(victim, now_s)
                if wanted <= 0 or seq.slot is None:
                    continue
            granted = blocks.allocate(wanted)
            seq.block_table.extend(granted)
            grants[seq.slot] = granted
        plan.grants = list(grants.items())

    def _blocks_missing(self, seq: Sequence, lookahead_tokens: int, blocks: BlockManager) -> int:
        room = min(seq.num_tokens + lookahead_tokens, seq.max_kv_tokens)
        return blocks.blocks_for(room) - len(seq.block_table)

    def _prefill(
        self, plan: Plan, blocks: BlockManager, capacity: ExecutorCapacity, now_s: float
    ) -> None:
        """Fills the token budget that decoding leaves: sequences under way first, then new ones."""
        budget = capacity.max_num_batched_tokens - len(self._decoding)
        for seq in list(self._prefilling.values()):
            if budget <= 0:
                return
            budget -= self._plan_chunk(plan, seq, budget, blocks)

        deferred = []
        self.is_full = not self._free_slots
        while budget > 0 and self._free_slots:
            candidate = self._waiting.pop()
            if candidate is None:
                break
            hashes = self.shareable_hashes(candidate, blocks.block_size)
            hits = blocks.match_prefix(hashes)
            if len(hits) < len(hashes) and hashes[len(hits)] in self._promised:
                # Another sequence is about to compute the very block that is missing here. Waiting
                # for it costs no more than computing it twice side by side.
                deferred.append(candidate)
                continue
            if not self._admit(plan, candidate, hashes, hits, blocks, now_s):
                # Later, smaller ones must not overtake, or large ones would starve.
                self.is_full = True
                deferred.append(candidate)
                break
            if candidate.history is not None:
                candidate.history.admitted(now_s, plan.step_id, capacity.executor_epoch)
            budget -= self._plan_chunk(plan, candidate, budget, blocks)
        self._waiting.push_all(deferred)

    def _admit(
        self,
        plan: Plan,
        seq: Sequence,
        hashes: list[BlockHash],
        hits: list[BlockId],
        blocks: BlockManager,
        now_s: float,
    ) -> bool:
        """Gives a waiting sequence a slot and blocks for all its tokens, if enough are left."""
        needed = blocks.blocks_for(seq.num_tokens) - len(hits)
        reserve = self._watermark(blocks) if self._slots else 0
        left = blocks.num_available - blocks.num_reclaimed_by(hits) - needed
        if left < reserve:
            return False
        ahead = min(seq.num_tokens + self._lookahead_tokens(blocks), seq.max_kv_tokens)
        extra = max(0, blocks.blocks_for(ahead) - blocks.blocks_for(seq.num_tokens))
        if left - extra < self._watermark(blocks):
            extra = 0

        blocks.share(hits)
        seq.block_table = hits + blocks.allocate(needed + extra)
        seq.slot = self._free_slots.pop()
        seq.admit_step_id = plan.step_id
        seq.num_planned_tokens = len(hits) * blocks.block_size
        seq.num_registered_blocks = len(hits)
        seq.move_to(SequenceStatus.PREFILLING)
        self._slots[seq.slot] = seq
        self._prefilling[seq.seq_id] = seq
        self.num_running_tokens += seq.cost_tokens
        self.stats.admitted_tokens += seq.cost_tokens
        for block_hash in hashes[len(hits) :]:
            self._promised.setdefault(block_hash, seq.seq_id)

        if seq.first_admitted_s is None:
            seq.first_admitted_s = now_s
            # A resumed sequence may find some of its output there as well.
            seq.num_cached_tokens = min(seq.num_planned_tokens, seq.num_prompt_tokens)
            self.stats.prefix_queried_tokens += seq.num_tokens
            self.stats.prefix_hit_tokens += seq.num_planned_tokens
        else:
            self.stats.recomputed_tokens += max(0, seq.num_computed_before - seq.num_planned_tokens)
        plan.admits.append(
            Admit(
                slot=seq.slot,
                token_ids=list(seq.token_ids),
                block_ids=list(seq.block_table),
                num_cached_tokens=seq.num_planned_tokens,
                num_prompt_tokens=seq.num_prompt_tokens,
                max_total_tokens=seq.max_total_tokens,
                # Beyond the limit it would say no more, and might not fit the wire's int32.
                min_total_tokens=min(seq.min_total_tokens, seq.max_total_tokens),
                stop_token_ids=seq.stop_token_ids,
                sampling=seq.sampling,
            )
        )
        return True

    def _plan_chunk(self, plan: Plan, seq: Sequence, budget: int, blocks: BlockManager) -> int:
        """Plans the next prefill chunk of an admitted sequence; returns its tokens."""
        if seq.slot is None:
            raise SequenceStateError(f"sequence {seq.seq_id} prefills without a slot")
        count = min(seq.num_tokens - seq.num_planned_tokens, budget)
        plan.chunks.append((seq.slot, count))
        seq.num_planned_tokens += count
        self._register_full_blocks(seq, seq.num_planned_tokens, blocks)
        if seq.num_planned_tokens == seq.num_tokens:
            del self._prefilling[seq.seq_id]
            self._decoding[seq.seq_id] = seq
            seq.move_to(SequenceStatus.DECODING)
        return count

    def _register_full_blocks(self, seq: Sequence, num_tokens: int, blocks: BlockManager) -> None:
        """Makes the blocks that hold the first `num_tokens` tokens findable."""
        full = num_tokens // blocks.block_size
        if not self.policy.enable_prefix_caching or full <= seq.num_registered_blocks:
            return
        hashes = seq.block_hashes(full, blocks.block_size)
        for index in range(seq.num_registered_blocks, full):
            is_new = blocks.register(seq.block_table[index], hashes[index])
            if is_new and self._prefix_listener is not None:
                start = index * blocks.block_size
                self._prefix_listener.on_stored(
                    StoredBlock(
                        block_hash=hashes[index],
                        parent=hashes[index - 1] if index else None,
                        token_ids=seq.token_ids[start : start + blocks.block_size],
                        cache_salt=seq.cache_salt,
                    )
                )
            if self._promised.get(hashes[index]) == seq.seq_id:
                del self._promised[hashes[index]]
        seq.num_registered_blocks = full

    def update(self, result: StepResult) -> tuple[list[Sequence], int]:
        """Takes in the tokens of one iteration.

        Returns the sequences that got a token, some of them finished now, and the number of tokens
        that the iteration computed. Tokens of a slot's former owner are dropped. Raises
        ExecutorProtocolError.
        """
        if self.capacity is None or self.blocks is None:
            raise ExecutorProtocolError("a result arrived, but no executor is attached")
        if result.applied_step_id > self._last_step_id:
            raise ExecutorProtocolError(
                f"plan {result.applied_step_id} was reported before it was sent"
            )
        num_tokens = len(result.slots)
        while self._prefill_plans and self._prefill_plans[0].step_id <= result.applied_step_id:
            # The last token of a completed prefill is counted with its chunk already.
            num_tokens = max(num_tokens, self._prefill_plans.popleft().num_tokens)
        progressed = []
        slots, max_num_seqs = self._slots, self.capacity.max_num_seqs
        block_size = self.blocks.block_size
        # Once per token: written for speed.
        for slot, token_id, flag in zip(
            result.slots, result.token_ids, result.finish_flags, strict=True
        ):
            seq = slots.get(SlotId(slot))
            if seq is None:
                if not 0 <= slot < max_num_seqs:
                    raise ExecutorProtocolError(f"slot {slot} does not exist")
                continue
            if result.applied_step_id < seq.admit_step_id:
                continue
            if flag != FINISH_NONE and flag not in _FINISH_REASONS:
                raise ExecutorProtocolError(f"slot {slot} has the unknown finish flag {flag}")
            num_computed = len(seq.token_ids)
            if seq.status is not SequenceStatus.DECODING or num_computed >= seq.max_total_tokens:
                raise ExecutorProtocolError(f"slot {slot} cannot have produced a token")
            is_longest = num_computed + 1 == seq.max_total_tokens
            # Queued again after its session, a sequence without room would never end.
            if is_longest and flag == FINISH_NONE:
                raise ExecutorProtocolError(f"slot {slot} goes on beyond its longest length")
            if not is_longest and flag == FINISH_LENGTH:
                raise ExecutorProtocolError(f"slot {slot} ended before its longest length")
            if seq.sampling.num_logprobs >= 0:
                logprobs = result.logprobs.get(slot)
                if logprobs is None:
                    raise ExecutorProtocolError(f"slot {slot} came without log-probabilities")
                seq.logprobs.append(logprobs)
            seq.token_ids.append(token_id)
            if num_computed // block_size > seq.num_registered_blocks:
                self._register_full_blocks(seq, num_computed, self.blocks)
            if flag != FINISH_NONE:
                self.finish(seq, _FINISH_REASONS[flag])
            progressed.append(seq)
        return progressed, num_tokens

    def _preempt(self, seq: Sequence, now_s: float) -> None:
        self.stats.num_preemptions += 1
        seq.num_preemptions += 1
        if seq.history is not None:
            seq.history.preempted(now_s)
        self._unseat(seq)
        self._return_to_queue(seq)

    def _unseat(self, seq: Sequence) -> None:
        """Takes slot and blocks away. The next plan says so before it gives them to anyone."""
        if seq.slot is None or self.blocks is None:
            return
        if seq.status is SequenceStatus.DECODING:
            seq.num_computed_before = seq.num_tokens - 1
            del self._decoding[seq.seq_id]
        else:
            seq.num_computed_before = seq.num_planned_tokens
            del self._prefilling[seq.seq_id]
            self._withdraw_promises(seq)
        del self._slots[seq.slot]
        self.num_running_tokens -= seq.cost_tokens
        self._pending_releases.append(seq.slot)
        self._free_slots.append(seq.slot)
        seq.slot = None
        self.blocks.release(seq.block_table)
        seq.block_table = []
        seq.num_planned_tokens = 0
        seq.num_registered_blocks = 0

    def _withdraw_promises(self, seq: Sequence) -> None:
        for block_hash in [h for h, owner in self._promised.items() if owner == seq.seq_id]:
            del self._promised[block_hash]

    def _return_to_queue(self, seq: Sequence) -> None:
        seq.move_to(SequenceStatus.WAITING)
        self._waiting.push(seq)

    def _lookahead_tokens(self, blocks: BlockManager) -> int:
        plenty = blocks.num_available * blocks.block_size // (4 * max(1, len(self._slots)))
        return min(self.policy.lookahead_tokens, max(plenty, self._SCARCE_LOOKAHEAD_TOKENS))

    def _watermark(self, blocks: BlockManager) -> int:
        return max(1, int(blocks.num_blocks * self.policy.watermark_ratio))

    def _capacity_tokens(self, seq: Sequence) -> int:
        return len(seq.block_table) * self.blocks.block_size if self.blocks else 0

    def verify(self) -> None:
        """Checks all accounting; for tests. Raises BlockAccountingError or ValueError."""
        self._waiting.verify()
        if self.blocks is None or self.capacity is None:
            return
        self.blocks.verify(seq.block_table for seq in self._slots.values())
        if len(self._slots) + len(self._free_slots) != self.capacity.max_num_seqs:
            raise ValueError("used and free slots are not all slots")
        if set(self._prefilling) | set(self._decoding) != {s.seq_id for s in self._slots.values()}:
            raise ValueError("sequences with a slot and running sequences differ")
        if self.num_running_tokens != sum(seq.cost_tokens for seq in self._slots.values()):
            raise ValueError("the cost of the running sequences is not their sum")
        if any(owner not in self._prefilling for owner in self._promised.values()):
            raise ValueError("a sequence that does not prefill still promises blocks")
