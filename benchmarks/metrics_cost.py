"""What the scheduler's metrics cost: recording a token, and the engine with and without them.

    python -m benchmarks.metrics_cost

Times are processor time of the one thread that both run on, so that a busy machine matters less.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.engine_loop import run_engine
from benchmarks.machine import describe_machine, machine_line
from benchmarks.report import write_json
from nanovllm.cli.options import positive_int
from scheduler_service.completion import Completion
from scheduler_service.executors.fleet import Fleet
from scheduler_service.executors.load import FleetLoad
from scheduler_service.scheduler import SchedulerPolicy
from scheduler_service.sequence import Sequence as TokenSequence
from scheduler_service.sequence import SequenceId
from scheduler_service.telemetry.metrics import SchedulerMetrics
from scheduler_service.telemetry.metrics.vllm import export_vllm_names
from scheduler_service.telemetry.request_metrics import EngineMetrics, RequestMetrics

_RUNNING = (1, 64, 256)
_TOKENS_PER_REPETITION = 50_000
_ENGINE_TOKENS = 20_000
_MAX_MODEL_LEN = 32_768


class NoMetrics:
    """An `EngineMetrics` that does nothing."""

    def on_iteration(self, num_tokens: int) -> None:
        """Does nothing."""

    def on_tokens(self, progress: Iterable[tuple[Completion, int]], now_s: float) -> None:
        """Does nothing."""

    def on_finished(self, completion: Completion) -> None:
        """Does nothing."""

    def on_request_finished(
        self, completions: Sequence[Completion], max_tokens: int | None
    ) -> None:
        """Does nothing."""


def own_metrics(load: FleetLoad) -> RequestMetrics:
    """Metrics under our own names."""
    return RequestMetrics(SchedulerMetrics(load, "model"))


def vllm_metrics(load: FleetLoad) -> RequestMetrics:
    """Metrics under vLLM's names as well."""
    metrics = SchedulerMetrics(load, "model")
    export_vllm_names(metrics, _MAX_MODEL_LEN)
    return RequestMetrics(metrics)


def no_metrics(load: FleetLoad) -> NoMetrics:
    """No metrics at all."""
    return NoMetrics()


@dataclass(frozen=True, slots=True)
class RecordingCost:
    """Microseconds of recording one generated token; medians over the repetitions."""

    num_running: int
    # Of sequences that got their last tokens together, as those that decode together do.
    own_us: float
    vllm_us: float
    # Of sequences that all got their last tokens at different times.
    own_scattered_us: float
    vllm_scattered_us: float


@dataclass(frozen=True, slots=True)
class EngineCost:
    """Thousands of tokens per second of the engine; medians over the rounds."""

    num_running: int
    none_ktok_s: float
    own_ktok_s: float
    vllm_ktok_s: float
    # Medians over the rounds of the time that metrics add to a token, within each round.
    own_us: float
    vllm_us: float

    @property
    def own_share(self) -> float:
        """Share of the engine's time that goes to our own metrics."""
        return self.own_us * self.own_ktok_s / 1e3


def measure_recording(num_running: int, repetitions: int) -> RecordingCost:
    """Times what the engine calls for every message of results with one token per sequence."""
    together = [10.0] * num_running
    scattered = [10.0 + 1e-6 * index for index in range(num_running)]
    costs: dict[str, list[float]] = {}
    for _ in range(repetitions):
        for name, make, last_s in (
            ("own_us", own_metrics, together),
            ("vllm_us", vllm_metrics, together),
            ("own_scattered_us", own_metrics, scattered),
            ("vllm_scattered_us", vllm_metrics, scattered),
        ):
            metrics = make(FleetLoad(Fleet(SchedulerPolicy())))
            costs.setdefault(name, []).append(_record(metrics, last_s))
    medians = {name: statistics.median(values) for name, values in costs.items()}
    return RecordingCost(num_running=num_running, **medians)


def _record(metrics: EngineMetrics, last_token_s: Sequence[float]) -> float:
    completions = []
    for index, last_s in enumerate(last_token_s):
        seq = TokenSequence(SequenceId(index), [1], max_total_tokens=1000)
        completion = Completion(index, seq, None, None)
        completion.first_token_s = completion.last_token_s = last_s
        completions.append(completion)
    counts = [1] * len(completions)
    num_messages = _TOKENS_PER_REPETITION // len(completions)
    start_s = time.thread_time()
    for index in range(num_messages):
        metrics.on_iteration(len(completions))
        metrics.on_tokens(zip(completions, counts, strict=True), 10.02 + 1e-7 * index)
    return (time.thread_time() - start_s) / (num_messages * len(completions)) * 1e6


def measure_engine(num_running: int, rounds: int) -> EngineCost:
    """Runs the engine with each kind of metrics in turn, in an order that changes."""
    kinds: list[tuple[str, Callable[[FleetLoad], EngineMetrics]]] = [
        ("none", no_metrics),
        ("own", own_metrics),
        ("vllm", vllm_metrics),
    ]
    num_iterations = max(1, _ENGINE_TOKENS // num_running)
    runs: dict[str, list[float]] = {name: [] for name, _ in kinds}
    for _ in range(rounds):
        for name, make_metrics in kinds:
            run = run_engine(make_metrics, num_sequences=num_running, num_iterations=num_iterations)
            runs[name].append(run.us_per_token)
        kinds = [*kinds[1:], kinds[0]]
    ktok_s = {f"{name}_ktok_s": 1e3 / statistics.median(times) for name, times in runs.items()}
    added = {
        f"{name}_us": statistics.median(
            with_metrics - without
            for with_metrics, without in zip(runs[name], runs["none"], strict=True)
        )
        for name in ("own", "vllm")
    }
    return EngineCost(num_running=num_running, **ktok_s, **added)


def format_costs(recording: Sequence[RecordingCost], engine: Sequence[EngineCost]) -> str:
    """Both tables."""
    lines = [
        "recording a token, us, of sequences that decode together and of scattered ones",
        f"{'running':>10}{'own':>9}{'vllm':>9}{'own, scattered':>17}{'vllm, scattered':>17}",
    ]
    lines += [
        f"{cost.num_running:>10}{cost.own_us:>9.3f}{cost.vllm_us:>9.3f}"
        f"{cost.own_scattered_us:>17.3f}{cost.vllm_scattered_us:>17.3f}"
        for cost in recording
    ]
    lines += [
        "the engine, thousand tokens/s of processor time, and what metrics add to a token",
        f"{'running':>10}{'none':>9}{'own':>9}{'vllm':>9}{'own us':>9}{'vllm us':>9}{'share':>9}",
    ]
    lines += [
        f"{cost.num_running:>10}{cost.none_ktok_s:>9.1f}{cost.own_ktok_s:>9.1f}"
        f"{cost.vllm_ktok_s:>9.1f}{cost.own_us:>9.3f}{cost.vllm_us:>9.3f}{cost.own_share:>9.1%}"
        for cost in engine
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.metrics_cost",
        description="Measures what recording the scheduler's metrics costs.",
    )
    parser.add_argument("--rounds", type=positive_int, default=9, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(arguments)
    machine = describe_machine()
    recording = [measure_recording(number, options.rounds) for number in _RUNNING]
    engine = [measure_engine(number, options.rounds) for number in _RUNNING]
    print(machine_line(machine))
    print(format_costs(recording, engine))
    if options.json is not None:
        write_json(
            options.json,
            {
                "machine": machine,
                "recording": [asdict(cost) for cost in recording],
                "engine": [asdict(cost) for cost in engine],
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
