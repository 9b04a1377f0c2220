"""What traces and log lines cost the scheduler: requests per second, CPU time for each request.

    python -m benchmarks.tracing_cost
    python -m benchmarks.tracing_cost --rounds 9 --json FILE

Starts both services for a tiny random model once for each variant, all at the same time, and runs
the same short requests against one after the other, round after round, in changing order. Short
requests make the cost as visible as it gets: it is one for each request, none for each token.
CPU time is that of the scheduler's process alone, with all its threads. The receiver of traces is a
process of its own; requests per second suffer from it too, since it shares the machine.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.machine import describe_machine, machine_line
from benchmarks.report import write_json
from benchmarks.trace_receiver import TraceReceiver, running_receiver
from nanovllm.aio import AsyncClient
from nanovllm.cli.options import positive_int
from nanovllm.errors import NanovllmError
from nanovllm.load import GrpcTarget, LoadReport, LoadRequest, run_load
from nanovllm.sampling_params import SamplingParams
from nanovllm.services import LocalServices, ServiceStartError
from tests.checkpoints import make_checkpoint

_QUIET = ("--log-level", "warning")
_JSON = ("--log-format", "json")
_BASELINE = "neither"
_EXECUTOR_ARGS = ("--device=cpu", "--num-kv-blocks=1024", "--num-threads=1")
_SPANS_PER_REQUEST = 4


class MeasurementFailedError(RuntimeError):
    """The figures mean nothing; the message says why."""


@dataclass(frozen=True, slots=True)
class RoundCost:
    """One round of one variant."""

    requests_per_s: float
    cpu_us_per_request: float


@dataclass(slots=True)
class Variant:
    """One way to run the scheduler."""

    name: str
    scheduler_args: Sequence[str]
    is_traced: bool = False
    rounds: list[RoundCost] = field(default_factory=list)

    @property
    def requests_per_s(self) -> float:
        """Median over the rounds."""
        return statistics.median(each.requests_per_s for each in self.rounds)

    @property
    def cpu_us_per_request(self) -> float:
        """Median over the rounds, in microseconds."""
        return statistics.median(each.cpu_us_per_request for each in self.rounds)


def variants(endpoint: str) -> list[Variant]:
    """What is compared; the first is the baseline."""
    tracing = ("--otlp-endpoint", endpoint)
    return [
        Variant(_BASELINE, _QUIET),
        Variant("text log", ()),
        Variant("JSON log", _JSON),
        Variant("traces", (*_QUIET, *tracing), is_traced=True),
        Variant("traces, JSON log", (*_JSON, *tracing), is_traced=True),
    ]


def measure(options: argparse.Namespace, folder: Path) -> list[Variant]:
    """Runs all rounds.

    Raises:
        MeasurementFailedError: A request failed, or traces got lost.
    """
    model = str(make_checkpoint(folder / "tiny", max_position_embeddings=1024))
    with running_receiver() as receiver:
        compared = variants(receiver.endpoint)
        with ExitStack() as stack:
            services = {
                variant.name: stack.enter_context(
                    LocalServices(
                        model,
                        executor_args=_EXECUTOR_ARGS,
                        scheduler_args=variant.scheduler_args,
                        log_dir=folder / variant.name,
                    )
                )
                for variant in compared
            }
            # The first round warms up.
            for number in range(options.rounds + 1):
                for variant in compared if number % 2 else compared[::-1]:
                    cost = asyncio.run(_round(services[variant.name], options))
                    if number:
                        variant.rounds.append(cost)
        # The schedulers have sent their last spans now.
        _check_spans(compared, receiver, options)
    return compared


async def _round(services: LocalServices, options: argparse.Namespace) -> RoundCost:
    requests = _requests(options)
    async with AsyncClient(services.address) as client:
        cpu_s = _cpu_s(services.scheduler.pid)
        report = LoadReport.of(await run_load(GrpcTarget(client), requests, options.concurrency))
        cpu_s = _cpu_s(services.scheduler.pid) - cpu_s
    if report.num_failed or report.num_refused:
        raise MeasurementFailedError(f"a request was not served: {report.errors}")
    return RoundCost(len(requests) / report.duration_s, cpu_s / len(requests) * 1e6)


def _requests(options: argparse.Namespace) -> list[LoadRequest]:
    params = SamplingParams(temperature=0.0, max_tokens=options.output_tokens, ignore_eos=True)
    return [
        LoadRequest([number % 256] * options.prompt_tokens, params)
        for number in range(options.requests)
    ]


def _cpu_s(pid: int) -> float:
    """CPU time of a process and all its threads since its start. Linux only."""
    # The clock that clock_getcpuclockid(3) gives; /proc counts in steps of 10 ms.
    return time.clock_gettime(~pid << 3 | 2)


def _check_spans(
    compared: Sequence[Variant], receiver: TraceReceiver, options: argparse.Namespace
) -> None:
    num_traced = sum(variant.is_traced for variant in compared)
    # One round more than is measured, to warm up.
    expected = num_traced * (options.rounds + 1) * options.requests * _SPANS_PER_REQUEST
    received = receiver.num_spans()
    if received != expected:
        raise MeasurementFailedError(f"{received} of {expected} spans were received")


def format_table(compared: Sequence[Variant]) -> str:
    """The results as text."""
    baseline = compared[0]
    lines = [f"{'variant':<18}{'req/s':>9}{'CPU us/req':>12}{'more':>9}{'more us':>9}"]
    for variant in compared:
        more_us = variant.cpu_us_per_request - baseline.cpu_us_per_request
        lines.append(
            f"{variant.name:<18}{variant.requests_per_s:>9.1f}{variant.cpu_us_per_request:>12.0f}"
            f"{more_us / baseline.cpu_us_per_request:>9.1%}{more_us:>9.0f}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tracing_cost",
        description="Measures what traces and log lines cost the scheduler.",
    )
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N")
    parser.add_argument("--requests", type=positive_int, default=600, metavar="N", help="a round")
    parser.add_argument("--concurrency", type=positive_int, default=16, metavar="N")
    parser.add_argument("--prompt-tokens", type=positive_int, default=16, metavar="N")
    parser.add_argument("--output-tokens", type=positive_int, default=8, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(arguments)
    machine = describe_machine()
    try:
        with tempfile.TemporaryDirectory(prefix="nanovllm-bench-") as folder:
            compared = measure(options, Path(folder))
    except (MeasurementFailedError, NanovllmError, ServiceStartError) as error:
        print(f"tracing_cost: {error}", file=sys.stderr)
        return 1
    print(machine_line(machine))
    print(format_table(compared))
    if options.json is not None:
        parameters = {
            name: getattr(options, name)
            for name in ("rounds", "requests", "concurrency", "prompt_tokens", "output_tokens")
        }
        results = [asdict(variant) for variant in compared]
        for result in results:
            # The port of this run's receiver says nothing.
            del result["scheduler_args"]
        write_json(options.json, {"machine": machine, "parameters": parameters, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
