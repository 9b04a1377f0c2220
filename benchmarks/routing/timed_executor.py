"""An executor that computes nothing but tells how long it would take."""

from collections import deque
from dataclasses import dataclass

from benchmarks.routing.workloads import answer_token
from scheduler_service.plan import FINISH_LENGTH, FINISH_NONE, Plan, StepResult
from scheduler_service.scheduler import ExecutorCapacity
from scheduler_service.sequence import SlotId, StepId


@dataclass(frozen=True, slots=True)
class TimeModel:
    """Time of an iteration, linear in its prompt tokens and its decoding rows.

    By default that of a dense model of eight billion parameters in 16 bits: its weights are read
    at 2.7 TB/s, prompts are computed with 160 TFLOP/s, and a row reads the KV of a thousand tokens.
    """

    fixed_s: float = 0.006
    prefill_tokens_per_s: float = 10_000.0
    decode_row_s: float = 0.000_05

    def iteration_s(self, num_prefill_tokens: int, num_decode_rows: int) -> float:
        """Seconds of one iteration."""
        return (
            self.fixed_s
            + num_prefill_tokens / self.prefill_tokens_per_s
            + num_decode_rows * self.decode_row_s
        )

    def times_as_fast(self, factor: int) -> "TimeModel":
        """Of an executor that gets `factor` times as much done by an iteration of the same time."""
        return TimeModel(
            self.fixed_s, self.prefill_tokens_per_s * factor, self.decode_row_s / factor
        )


@dataclass(slots=True)
class _Row:
    seed: int
    num_tokens: int
    # Known tokens whose KV is still to be computed before it decodes.
    num_to_prefill: int
    # Tokens that its blocks hold.
    room: int
    max_total_tokens: int


class TimedExecutor:
    """Applies plans and makes results; the caller lets the time pass between `begin` and `end`."""

    def __init__(self, capacity: ExecutorCapacity, time_model: TimeModel) -> None:
        self.plans: deque[Plan] = deque()
        self._block_size = capacity.block_size
        self._time_model = time_model
        self._rows: dict[SlotId, _Row] = {}
        self._decoding: dict[SlotId, _Row] = {}
        self._applied_step_id = StepId(0)
        self._result: StepResult | None = None

    @property
    def is_busy(self) -> bool:
        """Whether an iteration has begun and not ended."""
        return self._result is not None

    def begin(self) -> float | None:
        """Begins an iteration; returns its seconds, or None if there is nothing to do."""
        chunks: list[tuple[SlotId, int]] = []
        while self.plans and not chunks:
            chunks = self._apply(self.plans.popleft())
        # A row without room pauses until it is granted some.
        slots = [slot for slot, row in self._decoding.items() if row.num_tokens <= row.room]
        if not chunks and not slots:
            return None
        duration_s = self._time_model.iteration_s(sum(count for _, count in chunks), len(slots))
        for slot, count in chunks:
            row = self._rows[slot]
            row.num_to_prefill -= count
            if not row.num_to_prefill:
                self._decoding[slot] = row
                slots.append(slot)
        self._result = self._advance(slots)
        return duration_s

    def end(self) -> StepResult:
        """The result of the iteration that ends now. Raises ValueError if none was begun."""
        if self._result is None:
            raise ValueError("the executor has no iteration to end")
        result, self._result = self._result, None
        return result

    def _apply(self, plan: Plan) -> list[tuple[SlotId, int]]:
        self._applied_step_id = plan.step_id
        for slot in plan.releases:
            del self._rows[slot]
            self._decoding.pop(slot, None)
        for admit in plan.admits:
            self._rows[admit.slot] = _Row(
                seed=admit.sampling.seed,
                num_tokens=len(admit.token_ids),
                num_to_prefill=len(admit.token_ids) - admit.num_cached_tokens,
                room=len(admit.block_ids) * self._block_size,
                max_total_tokens=admit.max_total_tokens,
            )
        for slot, blocks in plan.grants:
            self._rows[slot].room += len(blocks) * self._block_size
        return plan.chunks

    def _advance(self, slots: list[SlotId]) -> StepResult:
        """One token for each slot."""
        token_ids = []
        flags = bytearray()
        for slot in slots:
            row = self._rows[slot]
            token_ids.append(answer_token(row.seed, row.num_tokens))
            row.num_tokens += 1
            is_last = row.num_tokens == row.max_total_tokens
            flags.append(FINISH_LENGTH if is_last else FINISH_NONE)
            if is_last:
                del self._decoding[slot]
        return StepResult(self._applied_step_id, list(map(int, slots)), token_ids, bytes(flags))
