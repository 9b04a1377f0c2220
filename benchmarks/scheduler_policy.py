"""What the policy costs: one iteration of the scheduler, and single operations on KV blocks.

    python -m benchmarks.scheduler_policy

An iteration is `Scheduler.update` with one token of every running sequence and the `schedule` that
follows. No executor runs: results are made up. Times are processor time of the one thread. Prompt
lengths differ, so that sequences ask for new blocks at different iterations, as they do in service.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.machine import describe_machine, machine_line
from benchmarks.report import write_json
from nanovllm.cli.options import positive_int
from scheduler_service.block_manager import BlockHash, BlockId, BlockManager, extend_hash, root_hash
from scheduler_service.plan import FINISH_NONE, StepResult
from scheduler_service.scheduler import ExecutorCapacity, Scheduler, SchedulerPolicy
from scheduler_service.sequence import Sequence as Completion
from scheduler_service.sequence import SequenceId, SlotSampling, StepId

T = TypeVar("T")

_RUNNING = (1, 64, 256, 1024, 4096)
_PROMPT_LENS = (100, 400)
_BLOCK_SIZE = 16
# Iterations that are timed together: every sequence fills two blocks.
_ITERATIONS = 2 * _BLOCK_SIZE
_POOLS = (1_000, 1_000_000)
_TOUCHED_BLOCKS = 1_000


@dataclass(frozen=True, slots=True)
class IterationCost:
    """Mean cost of an iteration in microseconds; medians over the repetitions."""

    num_running: int
    update_us: float
    schedule_us: float

    @property
    def total_us(self) -> float:
        """Both together."""
        return self.update_us + self.schedule_us

    @property
    def per_sequence_us(self) -> float:
        """The share of one sequence."""
        return self.total_us / self.num_running


@dataclass(frozen=True, slots=True)
class BlockCost:
    """Cost of one operation on one block in nanoseconds; medians over the repetitions."""

    num_blocks: int
    allocate_ns: float
    register_ns: float
    match_ns: float
    share_ns: float
    release_ns: float
    # Allocation that has to take blocks from the prefix cache.
    reclaim_ns: float


def measure_iterations(num_running: int, repetitions: int) -> IterationCost:
    """Runs sequences past their prefill and times the iterations that follow."""
    num_iterations = repetitions * _ITERATIONS
    scheduler, slots, step_id = _decoding_scheduler(num_running, num_iterations)
    generator = random.Random(0)
    update_us, schedule_us = [], []
    for _ in range(repetitions):
        update_s = schedule_s = 0.0
        for _ in range(_ITERATIONS):
            result = _result(step_id, slots, generator)
            start_s = time.thread_time()
            scheduler.update(result)
            updated_s = time.thread_time()
            plan = scheduler.schedule(0.0)
            schedule_s += time.thread_time() - updated_s
            update_s += updated_s - start_s
            if plan is not None:
                step_id = plan.step_id
        update_us.append(update_s / _ITERATIONS * 1e6)
        schedule_us.append(schedule_s / _ITERATIONS * 1e6)
    return IterationCost(num_running, statistics.median(update_us), statistics.median(schedule_us))


def _decoding_scheduler(
    num_running: int, num_output_tokens: int
) -> tuple[Scheduler, list[int], StepId]:
    """A scheduler whose sequences all decode, their slots, and the last plan's id."""
    generator = random.Random(num_running)
    prompts = [
        [generator.randrange(50_000) for _ in range(generator.randint(*_PROMPT_LENS))]
        for _ in range(num_running)
    ]
    # Two output tokens more than are made: nothing finishes.
    max_totals = [len(prompt) + num_output_tokens + 2 for prompt in prompts]
    policy = SchedulerPolicy()
    num_blocks = sum((total + policy.lookahead_tokens) // _BLOCK_SIZE + 2 for total in max_totals)
    longest = max(max_totals)
    scheduler = Scheduler(policy)
    scheduler.attach(
        ExecutorCapacity(
            # A tenth more than needed: the watermark is left alone.
            num_blocks=num_blocks + num_blocks // 10 + 10,
            block_size=_BLOCK_SIZE,
            max_num_seqs=num_running,
            max_num_batched_tokens=sum(map(len, prompts)) + num_running + 1,
            max_model_len=longest,
        )
    )
    for index, (prompt, max_total) in enumerate(zip(prompts, max_totals, strict=True)):
        scheduler.add(
            Completion(
                SequenceId(index),
                prompt,
                max_total_tokens=max_total,
                sampling=SlotSampling(seed=index),
            )
        )
    plan = scheduler.schedule(0.0)
    if plan is None or len(plan.chunks) != num_running:
        raise RuntimeError(f"the first plan does not prefill all {num_running} sequences")
    slots = [slot for slot, _ in plan.chunks]
    scheduler.update(_result(plan.step_id, slots, generator))
    return scheduler, list(map(int, slots)), plan.step_id


def _result(step_id: StepId, slots: Sequence[int], generator: random.Random) -> StepResult:
    return StepResult(
        applied_step_id=step_id,
        slots=list(slots),
        token_ids=[generator.randrange(50_000) for _ in slots],
        finish_flags=bytes([FINISH_NONE] * len(slots)),
    )


def measure_blocks(num_blocks: int, repetitions: int) -> BlockCost:
    """Times operations on a thousand blocks of a pool whose other blocks are in all states."""
    hashes: list[BlockHash] = [root_hash("")]
    for index in range(num_blocks // 2):
        hashes.append(extend_hash(hashes[-1], [index]))
    rounds = [_block_round(num_blocks, hashes[1:]) for _ in range(repetitions)]
    return BlockCost(
        num_blocks=num_blocks,
        **{name: statistics.median(costs[name] for costs in rounds) for name in rounds[0]},
    )


def _block_round(num_blocks: int, hashes: Sequence[BlockHash]) -> dict[str, float]:
    """Nanoseconds of each operation on one block, by the names of BlockCost's fields."""
    count = min(_TOUCHED_BLOCKS, num_blocks // 4)
    chain = hashes[:count]
    manager = BlockManager(num_blocks, _BLOCK_SIZE)
    # Half of the pool is cached, a quarter owned, the rest free.
    cached = manager.allocate(len(hashes) - count)
    for block, block_hash in zip(cached, hashes[count:], strict=True):
        manager.register(block, block_hash)
    manager.release(cached)
    manager.allocate(num_blocks // 4)

    costs: dict[str, float] = {}
    blocks = _timed(costs, "allocate_ns", count, lambda: manager.allocate(count))
    _timed(costs, "register_ns", count, lambda: _register(manager, blocks, chain))
    _timed(costs, "match_ns", count, lambda: manager.match_prefix(chain))
    _timed(costs, "share_ns", count, lambda: manager.share(blocks))
    _timed(costs, "release_ns", count, lambda: manager.release(blocks))
    manager.allocate(manager.num_free)
    _timed(costs, "reclaim_ns", count, lambda: manager.allocate(count))
    return costs


def _register(
    manager: BlockManager, blocks: Sequence[BlockId], hashes: Sequence[BlockHash]
) -> None:
    for block, block_hash in zip(blocks, hashes, strict=True):
        manager.register(block, block_hash)


def _timed(costs: dict[str, float], name: str, count: int, work: Callable[[], T]) -> T:
    start_s = time.thread_time()
    result = work()
    costs[name] = (time.thread_time() - start_s) / count * 1e9
    return result


def format_costs(iterations: Sequence[IterationCost], blocks: Sequence[BlockCost]) -> str:
    """Both tables."""
    lines = [f"{'running':>10}{'update us':>12}{'schedule us':>13}{'total us':>11}{'us a seq':>10}"]
    lines += [
        f"{cost.num_running:>10}{cost.update_us:>12.1f}{cost.schedule_us:>13.1f}"
        f"{cost.total_us:>11.1f}{cost.per_sequence_us:>10.3f}"
        for cost in iterations
    ]
    names = ("allocate", "register", "match", "share", "release", "reclaim")
    lines.append(f"{'pool':>10}" + "".join(f"{name + ' ns':>13}" for name in names))
    lines += [
        f"{cost.num_blocks:>10}"
        + "".join(f"{getattr(cost, name + '_ns'):>13.0f}" for name in names)
        for cost in blocks
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scheduler_policy",
        description="Measures the scheduling policy and the block manager.",
    )
    parser.add_argument("--repetitions", type=positive_int, default=5, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(arguments)
    machine = describe_machine()
    iterations = [measure_iterations(number, options.repetitions) for number in _RUNNING]
    blocks = [measure_blocks(number, options.repetitions) for number in _POOLS]
    print(machine_line(machine))
    print(format_costs(iterations, blocks))
    if options.json is not None:
        write_json(
            options.json,
            {
                "machine": machine,
                "iterations": [asdict(cost) for cost in iterations],
                "blocks": [asdict(cost) for cost in blocks],
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
