"""What the worker needs of a model runner, and what an iteration leaves behind."""

from dataclasses import dataclass
from typing import Protocol

from executor_service.slots import Chunk, SlotTable


@dataclass(frozen=True, slots=True)
class SlotLogprobs:
    """Log-probabilities of one slot's token."""

    slot: int
    chosen: float
    top_token_ids: list[int]
    top_logprobs: list[float]


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Tokens of one iteration, on the host; slots, token_ids and finish_flags are parallel."""

    slots: list[int]
    token_ids: list[int]
    finish_flags: list[int]
    # Of the slots that asked for them.
    logprobs: list[SlotLogprobs]
    # Time that the device worked, and that it had been idle since the iteration before, in seconds.
    busy_s: float
    idle_s: float
    # Whether the iteration was one replay of a CUDA graph.
    from_graph: bool = False


class PendingStep(Protocol):
    """An iteration on its way through the device."""

    def has_ended(self) -> bool:
        """Whether its results can be collected without waiting."""

    def collect(self) -> StepOutput:
        """Waits for its results."""


class Runner(Protocol):
    """Runs iterations; used by the worker thread only."""

    # Iterations that may be launched before the oldest one is collected. The device needs one in
    # reserve so that it never waits for the host; a CPU computes during launch and needs none.
    pipeline_depth: int

    def launch(self, chunks: list[Chunk], decode_slots: list[int], slots: SlotTable) -> PendingStep:
        """Starts prefill chunks together with slots that decode.

        Marks nothing on the host: `slots` must not have been advanced for this iteration yet.
        """
