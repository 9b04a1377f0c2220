"""One completion in the making: its tokens, its place on the executor and its life cycle."""

from dataclasses import dataclass
from enum import Enum
from typing import NewType

from scheduler_service.block_manager import BlockHash, BlockId, extend_hash, root_hash
from scheduler_service.history import History
from scheduler_service.router import ExecutorIndex

SequenceId = NewType("SequenceId", int)
SlotId = NewType("SlotId", int)
StepId = NewType("StepId", int)


class SequenceStatus(Enum):
    """Where a sequence stands."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"


# WAITING -> PREFILLING       admitted: has a slot and blocks
# PREFILLING -> DECODING      the plan that computes its last known token was made
# PREFILLING|DECODING -> WAITING   preempted, or the executor was lost
# any -> FINISHED             stopped, aborted or failed; owns nothing from here on
_TRANSITIONS = {
    SequenceStatus.WAITING: {SequenceStatus.PREFILLING, SequenceStatus.FINISHED},
    SequenceStatus.PREFILLING: {
        SequenceStatus.DECODING,
        SequenceStatus.WAITING,
        SequenceStatus.FINISHED,
    },
    SequenceStatus.DECODING: {SequenceStatus.WAITING, SequenceStatus.FINISHED},
    SequenceStatus.FINISHED: set(),
}


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SequenceStateError(RuntimeError):
    """A transition that the life cycle does not have; the scheduler has a bug."""


@dataclass(frozen=True, slots=True)
class SlotSampling:
    """How the executor chooses tokens; the meaning of each field is in executor.proto."""

    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    # -1: none returned.
    num_logprobs: int = -1


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one generated token, natural logarithm."""

    chosen: float
    top_token_ids: list[int]
    top_logprobs: list[float]


class Sequence:
    """State of one completion. Mutated by the scheduler only, on the engine's event loop."""

    __slots__ = (
        "_block_hashes",
        "admit_step_id",
        "arrival_s",
        "block_table",
        "cache_salt",
        "cost_tokens",
        "executor",
        "finish_reason",
        "first_admitted_s",
        "history",
        "logprobs",
        "max_total_tokens",
        "min_total_tokens",
        "num_cached_tokens",
        "num_computed_before",
        "num_executor_losses",
        "num_expected_cached_tokens",
        "num_planned_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_registered_blocks",
        "priority",
        "queued_s",
        "sampling",
        "seq_id",
        "slot",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        seq_id: SequenceId,
        prompt_token_ids: list[int],
        *,
        output_token_ids: tuple[int, ...] = (),
        max_total_tokens: int,
        min_total_tokens: int = 0,
        sampling: SlotSampling | None = None,
        stop_token_ids: tuple[int, ...] = (),
        priority: int = 0,
        arrival_s: float = 0.0,
        queued_s: float | None = None,
        cache_salt: str = "",
    ) -> None:
        self.seq_id = seq_id
        # With output of an earlier attempt, if the request was resumed.
        self.token_ids = [*prompt_token_ids, *output_token_ids]
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_total_tokens = max_total_tokens
        # What it counts for while it waits and runs; fixed, unlike the limit, so that sums hold.
        self.cost_tokens = max_total_tokens
        self.min_total_tokens = min_total_tokens
        self.sampling = sampling or SlotSampling()
        self.stop_token_ids = stop_token_ids
        self.priority = priority
        # When the server got the request, and when the sequence could first be admitted.
        self.arrival_s = arrival_s
        self.queued_s = arrival_s if queued_s is None else queued_s
        self.cache_salt = cache_salt
        self.status = SequenceStatus.WAITING
        self.finish_reason: FinishReason | None = None
        # When they were asked for, one per token generated here that no delta has taken yet.
        self.logprobs: list[TokenLogprobs] = []

        # Whose queue or batch it is in; None: no executor was chosen yet.
        self.executor: ExecutorIndex | None = None
        # Leading tokens that should be cached when it is admitted there. Fixed while it waits.
        self.num_expected_cached_tokens = 0
        # Place on the executor; meaningless while waiting.
        self.slot: SlotId | None = None
        self.admit_step_id = StepId(0)
        self.block_table: list[BlockId] = []
        # Leading tokens whose KV is cached or computed by a plan that was made.
        self.num_planned_tokens = 0
        # Leading blocks whose hash the block manager was told.
        self.num_registered_blocks = 0
        # By block size, in which executors may differ.
        self._block_hashes: dict[int, list[BlockHash]] = {}

        # History, for usage and metrics.
        self.first_admitted_s: float | None = None
        # Prompt tokens found in the prefix cache at the first admission.
        self.num_cached_tokens = 0
        # Tokens whose KV existed when the sequence lost its place.
        self.num_computed_before = 0
        self.num_preemptions = 0
        self.num_executor_losses = 0
        # Where a trace of the request is wanted.
        self.history: History | None = None

    @property
    def num_tokens(self) -> int:
        """Known tokens, prompt and output."""
        return len(self.token_ids)

    @property
    def num_uncached_tokens(self) -> int:
        """Known tokens that its executor is expected to compute before it goes on."""
        return len(self.token_ids) - self.num_expected_cached_tokens

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def max_kv_tokens(self) -> int:
        """Tokens whose KV is ever needed: the last one that is generated is never fed back."""
        return self.max_total_tokens - 1

    @property
    def is_finished(self) -> bool:
        """Whether the sequence ended."""
        return self.status is SequenceStatus.FINISHED

    def move_to(self, status: SequenceStatus) -> None:
        """The only way to change `status`. Raises SequenceStateError."""
        if status not in _TRANSITIONS[self.status]:
            raise SequenceStateError(f"sequence {self.seq_id}: {self.status} -> {status}")
        self.status = status

    def block_hashes(self, count: int, block_size: int) -> list[BlockHash]:
        """Hash chain of the first `count` full blocks; computed once per block."""
        hashes = self._block_hashes.get(block_size)
        if hashes is None:
            hashes = self._block_hashes[block_size] = []
        parent = hashes[-1] if hashes else root_hash(self.cache_salt)
        for index in range(len(hashes), count):
            parent = extend_hash(
                parent, self.token_ids[index * block_size : (index + 1) * block_size]
            )
            hashes.append(parent)
        return hashes[:count]
