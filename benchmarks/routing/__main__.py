"""Which executor should a request go to? The scheduler's router against other strategies.

    python -m benchmarks.routing
    python -m benchmarks.routing --max-imbalance 4 8 16 32 64 --json FILE

Four simulated executors, each with the real `Scheduler`; time is virtual, so the results depend on
neither the machine nor its load. An iteration takes a fixed time, more for every prompt token and
for every decoding row (`TimeModel`); plans and results travel in no time. For comparison the same
workloads go to one executor that has the cache, the slots and the speed of all four.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.machine import describe_machine, machine_line
from benchmarks.report import write_json
from benchmarks.routing.choice_cost import ChoiceCost, measure_choice
from benchmarks.routing.comparison import compare, format_comparison
from benchmarks.routing.simulation import Hardware
from benchmarks.routing.timed_executor import TimeModel
from benchmarks.routing.workloads import Workload, bursts, hot_prefix, multi_turn
from nanovllm.cli.options import positive_float, positive_int
from scheduler_service.router import RoutingPolicy
from scheduler_service.scheduler import ExecutorCapacity

_HARDWARE = Hardware(
    num_executors=4,
    capacity=ExecutorCapacity(
        num_blocks=4_096,
        block_size=16,
        max_num_seqs=64,
        max_num_batched_tokens=2_048,
        max_model_len=8_192,
    ),
    time_model=TimeModel(),
)
_FLEETS = (4, 16)
_CHOICES = 500


def workloads(scale: float, seed: int) -> Iterator[Workload]:
    """At scale 1 they last one to four minutes of virtual time; a smaller scale shortens them.

    The first is near what the executors can compute, the next two near and above what they can
    keep; then come two that tempt to send everything to one executor, or the same to all.
    """
    yield multi_turn("multi-turn, busy", round(1_200 * scale), 14.0, think_time_s=3.0, seed=seed)
    yield multi_turn("multi-turn, large", round(1_600 * scale), 10.0, think_time_s=10.0, seed=seed)
    yield multi_turn("multi-turn, larger", round(2_000 * scale), 8.0, think_time_s=25.0, seed=seed)
    yield hot_prefix("hot prefix", round(4_000 * scale), 90.0, seed=seed)
    yield bursts("bursts", round(200 * scale), 5.0, seed=seed)


def format_costs(costs: Sequence[ChoiceCost]) -> str:
    """The table of what a choice costs."""
    lines = [f"{'executors':<12}{'prompt':>8}{'hash us':>10}{'look up us':>12}{'choose us':>11}"]
    lines += [
        f"{cost.num_executors:<12}{cost.num_prompt_tokens:>8}{cost.hash_us:>10.1f}"
        f"{cost.look_up_us:>12.1f}{cost.choose_us:>11.1f}"
        for cost in costs
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    machine = describe_machine()
    policies = [RoutingPolicy(bound) for bound in options.max_imbalance]
    print(machine_line(machine))
    comparisons = []
    for workload in workloads(options.scale, options.seed):
        comparisons.append(compare(workload, _HARDWARE, policies, options.seed))
        print(format_comparison(comparisons[-1]), flush=True)
    costs = [measure_choice(number, _CHOICES) for number in _FLEETS]
    print(format_costs(costs))
    if options.json is not None:
        write_json(
            options.json,
            {
                "machine": machine,
                "hardware": asdict(_HARDWARE),
                "seed": options.seed,
                "scale": options.scale,
                "workloads": [each.as_dict() for each in comparisons],
                "choice": [asdict(cost) for cost in costs],
            },
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.routing",
        description="Compares ways to choose among several executors, on a virtual clock.",
    )
    parser.add_argument(
        "--max-imbalance",
        type=positive_int,
        nargs="+",
        default=[RoutingPolicy().max_imbalance],
        metavar="N",
        help="bounds of the prefix-aware strategy to compare (default: the scheduler's)",
    )
    parser.add_argument(
        "--scale", type=positive_float, default=1.0, metavar="F", help="length (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="(default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
