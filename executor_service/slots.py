"""The host's view of the slots: what each may do next. No torch.

The device holds the same state and is the one that decides when a slot finishes. The host learns
of that with the results; until then it may at worst run a finished slot, which the device ignores.
"""

from dataclasses import dataclass

from executor_service.plan_reader import (
    AdmitOrder,
    ExecutorLimits,
    PlanError,
    PlanOrder,
    SlotSampling,
)


@dataclass(slots=True)
class HostSlot:
    """An occupied slot."""

    sampling: SlotSampling
    # Known tokens, counting every token that a launched iteration will produce.
    num_tokens: int
    num_computed: int
    num_blocks: int
    max_total_tokens: int
    min_total_tokens: int
    # All known tokens are computed or launched: the slot goes on by itself.
    decoding: bool = False
    finished: bool = False
    # Increases with every owner, so that late results cannot be taken for a new owner's.
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Known tokens of a slot to run through the model."""

    slot: int
    start: int
    num_tokens: int
    # The slot's known tokens end here, so the iteration samples its next token.
    completes: bool

    @property
    def end(self) -> int:
        """Position behind the last token."""
        return self.start + self.num_tokens


class SlotTable:
    """All slots of one session."""

    def __init__(self, limits: ExecutorLimits) -> None:
        self._limits = limits
        self._slots: dict[int, HostSlot] = {}
        self._last_step_id = 0
        self._generation = 0

    @property
    def applied_step_id(self) -> int:
        """Newest plan that was applied."""
        return self._last_step_id

    @property
    def num_occupied(self) -> int:
        """Slots with an owner."""
        return len(self._slots)

    def __getitem__(self, slot: int) -> HostSlot:
        return self._slots[slot]

    def get(self, slot: int) -> HostSlot | None:
        """The slot's owner, or None."""
        return self._slots.get(slot)

    def clear(self) -> None:
        """Frees everything; the next plan is the first of a session."""
        self._slots.clear()
        self._last_step_id = 0

    def apply(self, plan: PlanOrder) -> list[Chunk]:
        """Takes in a plan and returns its chunks. Raises PlanError."""
        if plan.step_id != self._last_step_id + 1:
            raise PlanError(f"plan {plan.step_id} came after plan {self._last_step_id}")
        for slot in plan.releases:
            if self._slots.pop(slot, None) is None:
                raise PlanError(f"plan {plan.step_id} releases slot {slot}, which is free")
        for admit in plan.admits:
            self._admit(admit)
        for slot, blocks in plan.grants:
            state = self._occupied(slot)
            state.num_blocks += len(blocks)
            if state.num_blocks > self._limits.max_blocks_per_seq:
                raise PlanError(f"slot {slot} was granted more blocks than the model's length")
        chunks = [self._take_chunk(slot, count) for slot, count in plan.chunks]
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        num_decoding = len(self.runnable())
        if num_tokens + num_decoding > self._limits.max_num_batched_tokens:
            raise PlanError(
                f"plan {plan.step_id}: {num_tokens} prefill tokens and {num_decoding} decoding "
                f"slots exceed {self._limits.max_num_batched_tokens} tokens an iteration"
            )
        self._last_step_id = plan.step_id
        return chunks

    def runnable(self) -> list[int]:
        """Slots that decode and have room in their granted blocks."""
        size = self._limits.block_size
        return [
            slot
            for slot, state in self._slots.items()
            if state.decoding
            and not state.finished
            and state.num_tokens < state.max_total_tokens
            and state.num_computed < state.num_blocks * size
        ]

    def advance(self, slot: int) -> None:
        """An iteration that decodes one token of the slot was launched."""
        state = self._slots[slot]
        state.num_computed += 1
        state.num_tokens += 1

    def complete_prefill(self, slot: int) -> None:
        """An iteration that computes the slot's last known token was launched."""
        state = self._slots[slot]
        state.decoding = True
        state.num_tokens += 1

    def _admit(self, admit: AdmitOrder) -> None:
        if admit.slot in self._slots:
            raise PlanError(f"slot {admit.slot} is taken")
        self._generation += 1
        self._slots[admit.slot] = HostSlot(
            sampling=admit.sampling,
            num_tokens=len(admit.token_ids),
            num_computed=admit.num_cached_tokens,
            num_blocks=len(admit.block_ids),
            max_total_tokens=admit.max_total_tokens,
            min_total_tokens=admit.min_total_tokens,
            generation=self._generation,
        )

    def _take_chunk(self, slot: int, num_tokens: int) -> Chunk:
        state = self._occupied(slot)
        start = state.num_computed
        if state.decoding or start + num_tokens > state.num_tokens:
            raise PlanError(f"slot {slot} has no {num_tokens} known tokens left to compute")
        state.num_computed += num_tokens
        return Chunk(slot, start, num_tokens, completes=state.num_computed == state.num_tokens)

    def _occupied(self, slot: int) -> HostSlot:
        state = self._slots.get(slot)
        if state is None:
            raise PlanError(f"slot {slot} is free")
        return state
