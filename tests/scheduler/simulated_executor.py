"""An executor without a model: it executes plans literally and checks that they are lawful.

Every KV position remembers the hash of the exact token prefix that it was computed from. Before a
token is computed, the whole history of its sequence is looked up through the block table; a block
that was reused too early, shared wrongly or never computed shows at once. The next token is a
function of that history alone, so every schedule must produce the same text.
"""

import random
from collections import deque
from dataclasses import dataclass, field

from scheduler_service.plan import (
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_STOP_TOKEN,
    Admit,
    Plan,
    StepResult,
)
from scheduler_service.scheduler import ExecutorCapacity
from scheduler_service.sequence import TokenLogprobs

VOCAB_SIZE = 3


def next_token(prefix_hash: int) -> int:
    """The model: the token that follows a prefix."""
    return random.Random(prefix_hash).randrange(VOCAB_SIZE)


def extend(prefix_hash: int, token_id: int) -> int:
    return hash((prefix_hash, token_id))


def expected_output(
    prompt: list[int], max_total_tokens: int, stop_token_ids: tuple[int, ...]
) -> list[int]:
    """What a sequence must produce under any schedule."""
    prefix_hash = 0
    for token in prompt:
        prefix_hash = extend(prefix_hash, token)
    output: list[int] = []
    while len(prompt) + len(output) < max_total_tokens:
        token = next_token(prefix_hash)
        output.append(token)
        if token in stop_token_ids:
            break
        prefix_hash = extend(prefix_hash, token)
    return output


class UnlawfulPlanError(AssertionError):
    """The plan would corrupt a real executor."""


@dataclass
class _Slot:
    tokens: list[int]
    blocks: list[int]
    num_computed: int
    max_total_tokens: int
    stop_token_ids: tuple[int, ...]
    num_logprobs: int
    # Hash of the first i tokens at index i.
    prefix_hashes: list[int] = field(default_factory=lambda: [0])
    decoding: bool = False
    finished: bool = False


class SimulatedExecutor:
    """Queues plans and results, so that tests decide when either is seen."""

    def __init__(self, capacity: ExecutorCapacity) -> None:
        self.capacity = capacity
        self.plans: deque[Plan] = deque()
        self.results: deque[StepResult] = deque()
        self.num_paused_decodes = 0
        self._slots: dict[int, _Slot] = {}
        # Prefix hash that each KV position was computed from; None: never written.
        self._kv: list[int | None] = [None] * capacity.max_kv_tokens
        self._applied_step_id = 0
        self._iteration = 0

    @property
    def num_occupied_slots(self) -> int:
        return len(self._slots)

    def run_iteration(self) -> None:
        """Applies queued plans up to one with prefill chunks, then computes."""
        chunks: list[tuple[int, int]] = []
        applied = False
        while self.plans and not chunks:
            plan = self.plans.popleft()
            self._apply(plan)
            chunks = list(plan.chunks)
            applied = True
        produced = self._compute(chunks)
        if chunks or produced:
            self._iteration += 1
        elif not applied:
            return
        self.results.append(
            StepResult(
                applied_step_id=self._applied_step_id,
                slots=[slot for slot, _, _ in produced],
                token_ids=[token for _, token, _ in produced],
                finish_flags=bytes(flag for _, _, flag in produced),
                logprobs=self._logprobs([slot for slot, _, _ in produced]),
                iteration=self._iteration,
            )
        )

    def _apply(self, plan: Plan) -> None:
        if plan.step_id != self._applied_step_id + 1:
            raise UnlawfulPlanError(f"plan {plan.step_id} after {self._applied_step_id}")
        self._applied_step_id = plan.step_id
        for slot in plan.releases:
            if self._slots.pop(slot, None) is None:
                raise UnlawfulPlanError(f"slot {slot} is released but free")
        for admit in plan.admits:
            self._admit(admit)
        for slot, blocks in plan.grants:
            if slot not in self._slots:
                raise UnlawfulPlanError(f"slot {slot} gets blocks but is free")
            self._slots[slot].blocks.extend(blocks)
        self._check_single_writers()

    def _admit(self, admit: Admit) -> None:
        if admit.slot in self._slots or not 0 <= admit.slot < self.capacity.max_num_seqs:
            raise UnlawfulPlanError(f"slot {admit.slot} is not free")
        if admit.num_cached_tokens >= len(admit.token_ids):
            raise UnlawfulPlanError("nothing left to compute")
        state = _Slot(
            tokens=list(admit.token_ids),
            blocks=list(admit.block_ids),
            num_computed=admit.num_cached_tokens,
            max_total_tokens=admit.max_total_tokens,
            stop_token_ids=admit.stop_token_ids,
            num_logprobs=admit.sampling.num_logprobs,
        )
        for token in state.tokens:
            state.prefix_hashes.append(extend(state.prefix_hashes[-1], token))
        self._slots[admit.slot] = state

    def _check_single_writers(self) -> None:
        """A block has at most one slot that has yet to write any of its positions."""
        writers: dict[int, int] = {}
        for slot, state in self._slots.items():
            if state.finished:
                continue
            for block in state.blocks[state.num_computed // self.capacity.block_size :]:
                if block in writers:
                    raise UnlawfulPlanError(f"slots {writers[block]} and {slot} write to {block}")
                writers[block] = slot

    def _compute(self, chunks: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        decoding = [slot for slot, state in self._slots.items() if state.decoding]
        work: list[tuple[int, int]] = list(chunks)
        for slot in decoding:
            state = self._slots[slot]
            if state.finished:
                continue
            if len(state.blocks) * self.capacity.block_size < len(state.tokens):
                self.num_paused_decodes += 1
                continue
            work.append((slot, 1))
        if sum(count for _, count in work) > self.capacity.max_num_batched_tokens:
            raise UnlawfulPlanError("the iteration exceeds max_num_batched_tokens")
        # As on a device: the whole batch writes its KV before anything is read.
        for slot, count in work:
            state = self._slots.get(slot)
            if state is None or count < 1 or state.num_computed + count > len(state.tokens):
                raise UnlawfulPlanError(f"chunk of {count} tokens for slot {slot}")
            for position in range(state.num_computed, state.num_computed + count):
                self._kv[self._address(state, position)] = state.prefix_hashes[position + 1]
        return [token for slot, count in work if (token := self._advance(slot, count)) is not None]

    def _advance(self, slot: int, count: int) -> tuple[int, int, int] | None:
        state = self._slots[slot]
        state.num_computed += count
        for position in range(state.num_computed):
            if self._kv[self._address(state, position)] != state.prefix_hashes[position + 1]:
                raise UnlawfulPlanError(f"slot {slot} reads wrong KV at position {position}")
        if state.num_computed < len(state.tokens):
            return None
        state.decoding = True
        token = next_token(state.prefix_hashes[-1])
        state.tokens.append(token)
        state.prefix_hashes.append(extend(state.prefix_hashes[-1], token))
        flag = FINISH_NONE
        if token in state.stop_token_ids:
            flag = FINISH_STOP_TOKEN
        elif len(state.tokens) >= state.max_total_tokens:
            flag = FINISH_LENGTH
        state.finished = flag != FINISH_NONE
        return slot, token, flag

    def _logprobs(self, slots: list[int]) -> dict[int, TokenLogprobs]:
        """Of the right size for the slots that want them; their values mean nothing."""
        wanted = {slot: self._slots[slot].num_logprobs for slot in slots}
        return {
            slot: TokenLogprobs(-1.0, list(range(count)), [-1.0] * count)
            for slot, count in wanted.items()
            if count >= 0
        }

    def _address(self, state: _Slot, position: int) -> int:
        size = self.capacity.block_size
        if position >= len(state.blocks) * size:
            raise UnlawfulPlanError("a slot runs past its granted blocks")
        return state.blocks[position // size] * size + position % size
