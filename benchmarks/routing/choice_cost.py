"""What a choice costs the scheduler's event loop."""

import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from scheduler_service.executors.fleet import Fleet
from scheduler_service.router import Router, RoutingPolicy
from scheduler_service.scheduler import ExecutorCapacity, SchedulerPolicy
from scheduler_service.sequence import Sequence, SequenceId

T = TypeVar("T")

_PROMPT_TOKENS = 1_000
_SHARED_TOKENS = 512
_OUTPUT_TOKENS = 16
_BLOCK_SIZE = 16
_VOCAB_SIZE = 50_000


@dataclass(frozen=True, slots=True)
class ChoiceCost:
    """Medians in microseconds for one request."""

    num_executors: int
    num_prompt_tokens: int
    # The hash chain of the prompt, which admission needs in any case.
    hash_us: float
    # Looking its prefix up at every executor.
    look_up_us: float
    # `Router.choose`.
    choose_us: float


def measure_choice(num_executors: int, repetitions: int) -> ChoiceCost:
    """Routes prompts whose first half is cached everywhere; every executor has a queue.

    Times are processor time of the one thread.
    """
    generator = random.Random(num_executors)
    shared = _tokens(generator, _SHARED_TOKENS)
    ids = map(SequenceId, count())
    fleet = _fleet_with_queues(num_executors, shared, generator, ids)
    router = Router(RoutingPolicy())
    costs = []
    for _ in range(repetitions):
        own = _tokens(generator, _PROMPT_TOKENS - _SHARED_TOKENS)
        costs.append(_choose(_sequence(next(ids), shared + own), fleet, router))
    medians = map(statistics.median, zip(*costs, strict=True))
    return ChoiceCost(num_executors, _PROMPT_TOKENS, *medians)


def _choose(seq: Sequence, fleet: Fleet, router: Router) -> tuple[float, float, float]:
    """Microseconds of the three steps."""
    num_blocks = (seq.num_tokens - 1) // _BLOCK_SIZE
    hash_us, _ = _timed(lambda: seq.block_hashes(num_blocks, _BLOCK_SIZE))
    look_up_us, candidates = _timed(lambda: [each.candidate(seq) for each in fleet.members])
    choose_us, _ = _timed(lambda: router.choose(candidates))
    return hash_us, look_up_us, choose_us


def _fleet_with_queues(
    num_executors: int, shared: list[int], generator: random.Random, ids: Iterator[SequenceId]
) -> Fleet:
    """Executors that have computed the common prefix, each with four more prompts in its queue."""
    capacity = ExecutorCapacity(
        num_blocks=4_096,
        block_size=_BLOCK_SIZE,
        max_num_seqs=64,
        max_num_batched_tokens=2 * _SHARED_TOKENS,
        max_model_len=4 * _PROMPT_TOKENS,
    )
    fleet = Fleet(SchedulerPolicy(), RoutingPolicy())
    for number in range(num_executors):
        scheduler = fleet.join(f"executor-{number}").scheduler
        scheduler.attach(capacity)
        scheduler.add(_sequence(next(ids), shared + [0]))
        scheduler.schedule(0.0)
        for _ in range(4):
            scheduler.add(_sequence(next(ids), _tokens(generator, _PROMPT_TOKENS)))
    return fleet


def _sequence(seq_id: SequenceId, prompt: list[int]) -> Sequence:
    return Sequence(seq_id, prompt, max_total_tokens=len(prompt) + _OUTPUT_TOKENS)


def _tokens(generator: random.Random, count: int) -> list[int]:
    return generator.choices(range(_VOCAB_SIZE), k=count)


def _timed(work: Callable[[], T]) -> tuple[float, T]:
    """Microseconds of the work, and what it returned."""
    start_s = time.thread_time()
    result = work()
    return (time.thread_time() - start_s) * 1e6, result
