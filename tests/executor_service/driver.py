"""Runs plans on a real model, one iteration at a time, as the worker does."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from executor_service.batch_state import FINISH_NOT_RUN, BatchState
from executor_service.model_runner import ModelRunner
from executor_service.plan_reader import ExecutorLimits, PlanOrder
from executor_service.runner import StepOutput
from executor_service.slots import SlotTable
from nanovllm_core.attention import create_backend
from nanovllm_core.config import ModelConfig
from nanovllm_core.kv_cache import KVCache
from nanovllm_core.loader import load_model
from tests.executor_service.plans import LIMITS, order

CPU = torch.device("cpu")


@dataclass
class Driver:
    """A model with an empty batch."""

    directory: Path
    limits: ExecutorLimits = LIMITS
    #: Tokens that each slot produced.
    tokens: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config = ModelConfig.from_directory(self.directory)
        model = load_model(self.directory, config, torch.float32, CPU)
        self.cache = KVCache(
            config, self.limits.num_blocks, self.limits.block_size, torch.float32, CPU
        )
        self.state = BatchState(self.limits, CPU)
        self.slots = SlotTable(self.limits)
        backend = create_backend("torch", config, CPU)
        self.runner = ModelRunner(model, self.cache, backend, self.state)

    def step(self, **plan) -> StepOutput:
        """Applies a plan, empty or not, and runs one iteration."""
        return self.launch(self._order(plan))

    def launch(self, plan: PlanOrder, *, also: tuple[int, ...] = ()) -> StepOutput:
        """One iteration; `also` are slots that run although the host knows better."""
        chunks = self.slots.apply(plan)
        if plan.releases:
            self.state.release(plan.releases)
        for item in plan.admits:
            self.state.admit([item])
            self.tokens[item.slot] = []
        for slot, blocks in plan.grants:
            self.state.grant([slot], [self.slots[slot].num_blocks - len(blocks)], [blocks])
        decode_slots = self.slots.runnable()
        output = self.runner.launch(chunks, [*decode_slots, *also], self.slots).collect()
        for slot in decode_slots:
            self.slots.advance(slot)
        for chunk in chunks:
            if chunk.completes:
                self.slots.complete_prefill(chunk.slot)
        for slot, token, flag in zip(
            output.slots, output.token_ids, output.finish_flags, strict=True
        ):
            if flag != FINISH_NOT_RUN:
                self.tokens[slot].append(token)
                self.slots[slot].finished = flag != 0
        return output

    def launch_also(self, *slots: int) -> StepOutput:
        """Runs slots that the host would not."""
        return self.launch(self._order({}), also=slots)

    def run(self, limit: int = 200) -> None:
        """Iterates until no slot can go on."""
        for _ in range(limit):
            if not self.slots.runnable():
                return
            self.step()
        raise TimeoutError("slots go on for ever")

    def _order(self, plan: dict) -> PlanOrder:
        return order(self.slots.applied_step_id + 1, limits=self.limits, **plan)
