"""One workload with every strategy, and the table of it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.routing.simulation import Hardware, Outcome, Simulation
from benchmarks.routing.strategies import (
    AnyExecutor,
    LeastLoaded,
    PrefixAware,
    RoundRobin,
    Strategy,
)
from benchmarks.routing.workloads import Workload
from nanovllm.load import Percentiles
from scheduler_service.router import RoutingPolicy

_HEAD = (
    f"{'strategy':<24}{'hit rate':>9}{'of one':>8}{'TTFT p50':>10}{'p99':>10}"
    f"{'imbalance':>11}{'out tok/s':>11}"
)


@dataclass(frozen=True, slots=True)
class Run:
    """One strategy's run."""

    strategy: str
    outcome: Outcome
    # Against the one executor's, which has 1.
    hit_rate_ratio: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON; latencies in virtual seconds."""
        ttft_s = Percentiles.of(self.outcome.ttft_s)
        return {
            "strategy": self.strategy,
            "hit_rate": self.outcome.hit_rate,
            "hit_rate_ratio": self.hit_rate_ratio,
            "ttft_s": None if ttft_s is None else asdict(ttft_s),
            "max_imbalance": self.outcome.max_imbalance,
            "output_tokens_per_s": self.outcome.output_tokens_per_s,
            "num_preemptions": self.outcome.stats.num_preemptions,
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """All strategies with one workload."""

    workload: str
    num_requests: int
    # Mean working set of the run on one executor, over the KV that all executors have.
    working_set_ratio: float
    runs: Sequence[Run]

    def run(self, strategy: str) -> Run:
        """The run of a strategy. Raises KeyError."""
        return {each.strategy: each for each in self.runs}[strategy]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "workload": self.workload,
            "num_requests": self.num_requests,
            "working_set_ratio": self.working_set_ratio,
            "runs": [run.as_dict() for run in self.runs],
        }


def prefix_aware(policy: RoutingPolicy) -> str:
    """Name of the scheduler's strategy with this policy."""
    return f"prefix-aware, bound {policy.max_imbalance}"


def compare(
    workload: Workload, hardware: Hardware, policies: Sequence[RoutingPolicy], seed: int
) -> Comparison:
    """Serves the workload on one executor, and on several with every strategy and policy."""
    single = Simulation(hardware.as_one(), RoutingPolicy(), RoundRobin()).run(workload)
    runs = [Run("one executor", single, hit_rate_ratio=1.0)]
    for name, policy, strategy in _strategies(policies, seed):
        outcome = Simulation(hardware, policy, strategy).run(workload)
        runs.append(Run(name, outcome, outcome.hit_rate / single.hit_rate))
    kv_tokens = hardware.num_executors * hardware.capacity.max_kv_tokens
    return Comparison(
        workload.name, workload.num_requests, single.working_set_tokens / kv_tokens, runs
    )


def _strategies(
    policies: Sequence[RoutingPolicy], seed: int
) -> Iterator[tuple[str, RoutingPolicy, Strategy]]:
    for policy in policies:
        yield prefix_aware(policy), policy, PrefixAware()
    # These ask nobody.
    unused = RoutingPolicy()
    yield "round robin", unused, RoundRobin()
    yield "least loaded", unused, LeastLoaded()
    yield "random", unused, AnyExecutor(seed)


def format_comparison(comparison: Comparison) -> str:
    """The table of one workload; latencies in virtual milliseconds."""
    return "\n".join(
        [
            f"{comparison.workload}: {comparison.num_requests} requests, "
            f"working set {comparison.working_set_ratio:.2f} x KV",
            _HEAD,
            *map(_row, comparison.runs),
        ]
    )


def _row(run: Run) -> str:
    outcome = run.outcome
    ttft_s = Percentiles.of(outcome.ttft_s)
    latencies = (
        f"{'n/a':>10}{'n/a':>10}"
        if ttft_s is None
        else f"{ttft_s.p50 * 1e3:>10.1f}{ttft_s.p99 * 1e3:>10.1f}"
    )
    return (
        f"{run.strategy:<24}{outcome.hit_rate:>9.1%}{run.hit_rate_ratio:>8.3f}{latencies}"
        f"{outcome.max_imbalance:>11}{outcome.output_tokens_per_s:>11.0f}"
    )
