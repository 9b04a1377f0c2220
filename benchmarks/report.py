"""Repeated runs of a workload: median, spread, table and JSON."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.executor_counters import ExecutorCounters
from benchmarks.workloads import Workload
from nanovllm.load import LoadReport

_HEAD = (
    f"{'workload':<12}{'out tok/s':>11}{'min':>10}{'max':>10}{'wall s':>9}"
    f"{'TTFT p50':>10}{'p99':>9}{'ITL p50':>9}{'p99':>9}{'tok/delta':>10}{'idle':>8}"
)
_LATENCY_NOTE = "latencies in ms, medians over the runs; idle: device idle while work existed"


class RequestsFailedError(RuntimeError):
    """A run is worth nothing because requests failed; the message has the first reason."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a workload."""

    report: LoadReport
    # What the executor counted meanwhile; None if its metrics are out of reach.
    executor: ExecutorCounters | None


@dataclass(frozen=True, slots=True)
class Result:
    """All runs of one workload."""

    workload: Workload
    runs: Sequence[Run]

    @property
    def tokens_per_s(self) -> float:
        """Median output tokens per second."""
        return statistics.median(run.report.output_tokens_per_s for run in self.runs)

    def median(self, value: Callable[[LoadReport], float | None]) -> float | None:
        """Median over the runs that have the value."""
        values = [found for run in self.runs if (found := value(run.report)) is not None]
        return statistics.median(values) if values else None

    @property
    def idle_share(self) -> float | None:
        """Median share of the time that the device idled although a slot could have run."""
        shares = [run.executor.idle_share for run in self.runs if run.executor is not None]
        return statistics.median(shares) if shares else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "workload": self.workload.name,
            "num_requests": len(self.workload.requests),
            "num_prompt_tokens": self.workload.num_prompt_tokens,
            "num_output_tokens": self.workload.num_output_tokens,
            "temperature": self.workload.temperature,
            "ids_folded_into_vocabulary": self.workload.ids_folded,
            "output_tokens_per_s": self.tokens_per_s,
            "idle_share": self.idle_share,
            "runs": [
                {
                    "report": run.report.as_dict(),
                    "executor": None if run.executor is None else asdict(run.executor),
                }
                for run in self.runs
            ],
        }


def check_run(workload: Workload, report: LoadReport) -> LoadReport:
    """Returns the report. Raises RequestsFailedError unless every token that was due came."""
    if num_bad := report.num_requests - report.num_complete:
        raise RequestsFailedError(
            f"{workload.name}: {num_bad} of {report.num_requests} requests failed: "
            f"{report.errors[0]}"
        )
    if report.num_output_tokens != workload.num_output_tokens:
        raise RequestsFailedError(
            f"{workload.name}: {report.num_output_tokens} tokens came, "
            f"{workload.num_output_tokens} were due; does the server cap the length?"
        )
    return report


def format_table(results: Sequence[Result]) -> str:
    """The results as text."""
    lines = [_HEAD, *(_row(result) for result in results), _LATENCY_NOTE]
    folded = [result.workload.name for result in results if result.workload.ids_folded]
    if folded:
        lines.append(
            f"token ids of {', '.join(folded)} were taken modulo the model's vocabulary size"
        )
    return "\n".join(lines)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a document that people diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def _row(result: Result) -> str:
    rates = [run.report.output_tokens_per_s for run in result.runs]
    idle = result.idle_share
    tokens_per_delta = result.median(
        lambda report: report.num_output_tokens / report.num_deltas if report.num_deltas else None
    )
    return (
        f"{result.workload.name:<12}{result.tokens_per_s:>11.1f}{min(rates):>10.1f}"
        f"{max(rates):>10.1f}{result.median(lambda report: report.duration_s):>9.2f}"
        + _ms(result.median(lambda report: report.ttft_s.p50 if report.ttft_s else None), 10)
        + _ms(result.median(lambda report: report.ttft_s.p99 if report.ttft_s else None), 9)
        + _ms(result.median(lambda report: report.itl_s.p50 if report.itl_s else None), 9)
        + _ms(result.median(lambda report: report.itl_s.p99 if report.itl_s else None), 9)
        + (f"{'n/a':>10}" if tokens_per_delta is None else f"{tokens_per_delta:>10.1f}")
        + (f"{'n/a':>8}" if idle is None else f"{idle:>8.2%}")
    )


def _ms(value_s: float | None, width: int) -> str:
    return f"{'n/a':>{width}}" if value_s is None else f"{value_s * 1e3:>{width}.2f}"
