"""Ten times more requests than the services can serve: what do those that are let in notice?

    python -m benchmarks.overload
    python -m benchmarks.overload --seconds 60 --factor 10 --json FILE

Starts both services, by default for a tiny random model and with few slots, so that the load
generator beside them can overload them. It measures the capacity with a closed loop, then sends
requests as a Poisson process: first at --factor times the capacity, then at 90 % of the rate that
was served meanwhile, with nothing to refuse. The latencies of the two are to be compared. Refused
requests are not sent again.
"""

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, machine_line
from benchmarks.options import add_engine_options
from benchmarks.process_memory import MemoryReport, MemorySampler
from benchmarks.report import write_json
from nanovllm.aio import AsyncClient
from nanovllm.cli.options import positive_float, positive_int
from nanovllm.errors import NanovllmError, OverloadedError
from nanovllm.load import GrpcTarget, LoadReport, LoadRequest, Percentiles, Session
from nanovllm.load.arrivals import Arrivals, arrival_times
from nanovllm.load.runner import run_load, run_open
from nanovllm.load.target import Piece, RequestFailedError
from nanovllm.model_store import ModelNotFoundError
from nanovllm.sampling_params import SamplingParams
from nanovllm.services import LocalServices, ServiceStartError
from tests.checkpoints import make_checkpoint

_TINY = "tiny"
_NUM_PROMPTS = 512
# Below what was admitted, so that no queue builds up by chance alone.
_UNLOADED_SHARE = 0.9
_MEMORY_INTERVAL_S = 1.0
_HEAD = (
    f"{'load':<11}{'sent/s':>8}{'served/s':>9}{'refused':>9}"
    f"{'TTFT p50':>10}{'p99':>8}{'E2E p50':>9}{'p99':>8}"
    f"{'refusal p50':>13}{'p99':>8}{'hint p50':>10}{'p99':>8}{'late p99':>10}"
)


class OverloadError(RuntimeError):
    """The measurement means nothing; the message says why."""


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """One run at a fixed rate; times in seconds."""

    offered_per_s: float
    report: LoadReport
    # From the moment a request was due to its refusal.
    refusal_s: Percentiles | None
    retry_after_s: Percentiles | None

    @property
    def served_per_s(self) -> float:
        """Rate of the requests that got their answer."""
        return self.report.requests_per_s


class _HintTarget(GrpcTarget):
    """Writes down when refused requests are asked to come back."""

    def __init__(self, client: AsyncClient) -> None:
        super().__init__(client)
        self.hints_s: list[float] = []

    async def answer(self, request: LoadRequest) -> AsyncIterator[Piece]:
        """See `Target`."""
        try:
            async for piece in super().answer(request):
                yield piece
        except RequestFailedError as error:
            if isinstance(error.__cause__, OverloadedError):
                self.hints_s.append(error.__cause__.retry_after_s)
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    machine = describe_machine()
    try:
        with tempfile.TemporaryDirectory(prefix="overload-") as folder:
            document = _measure(options, Path(folder))
    except (OverloadError, NanovllmError, ModelNotFoundError, ServiceStartError) as error:
        print(f"overload: {error}", file=sys.stderr)
        return 1
    print(machine_line(machine))
    print(document.pop("table"))
    if options.json is not None:
        write_json(options.json, {"machine": machine, **document})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overload",
        description="Measures what accepted requests notice of an overload.",
    )
    add_engine_options(parser)
    parser.set_defaults(model=_TINY)
    parser.add_argument("--seconds", type=positive_float, default=120.0, metavar="S")
    parser.add_argument("--factor", type=positive_float, default=10.0, metavar="F")
    parser.add_argument("--slots", type=positive_int, default=8, metavar="N")
    parser.add_argument("--prompt-tokens", type=positive_int, default=32, metavar="N")
    parser.add_argument("--output-tokens", type=positive_int, default=256, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    return parser


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = options.model
    if model == _TINY:
        model = str(make_checkpoint(folder / _TINY, max_position_embeddings=2048))
    with LocalServices(
        model,
        executor_args=[f"--max-num-seqs={options.slots}", *options.executor_arg],
        scheduler_args=["--max-queue-wait-s=auto", *options.scheduler_arg],
        log_dir=folder,
    ) as services:
        return asyncio.run(_measure_at(services, options))


async def _measure_at(services: LocalServices, options: argparse.Namespace) -> dict[str, Any]:
    async with AsyncClient(services.address) as client:
        info = await client.model_info()
        requests = _requests(options, info.vocab_size)
        capacity_per_s = await _capacity(client, requests, options.slots)
        pids = {"scheduler": services.scheduler.pid, "executor": services.executor.pid}
        async with MemorySampler(pids, _MEMORY_INTERVAL_S) as memory:
            overload = await _run(
                client, requests, options.factor * capacity_per_s, options.seconds, seed=1
            )
        unloaded_per_s = _UNLOADED_SHARE * overload.served_per_s
        unloaded = await _run(client, requests, unloaded_per_s, options.seconds, seed=2)
    return {
        "table": _table(capacity_per_s, options.factor, unloaded, overload, memory.reports),
        "parameters": {
            name: getattr(options, name)
            for name in ("seconds", "factor", "slots", "prompt_tokens", "output_tokens", "model")
        }
        | {"executor_args": options.executor_arg, "scheduler_args": options.scheduler_arg},
        "capacity_per_s": capacity_per_s,
        "unloaded": asdict(unloaded),
        "overload": asdict(overload),
        "memory": {name: asdict(report) for name, report in memory.reports.items()},
    }


def _requests(options: argparse.Namespace, vocab_size: int) -> list[LoadRequest]:
    rng = random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=options.output_tokens, ignore_eos=True)
    return [
        LoadRequest(rng.choices(range(vocab_size), k=options.prompt_tokens), params)
        for _ in range(_NUM_PROMPTS)
    ]


async def _capacity(client: AsyncClient, requests: Sequence[LoadRequest], slots: int) -> float:
    """Requests per second with every slot busy and nothing queued."""
    target = GrpcTarget(client)
    await run_load(target, requests[: 2 * slots], slots)
    report = LoadReport.of(await run_load(target, requests[: 16 * slots], slots))
    _check(report)
    return report.requests_per_s


async def _run(
    client: AsyncClient,
    requests: Sequence[LoadRequest],
    rate_per_s: float,
    duration_s: float,
    seed: int,
) -> OpenLoop:
    target = _HintTarget(client)
    count = max(1, round(rate_per_s * duration_s))
    arrivals_s = arrival_times(Arrivals.POISSON, count, rate=rate_per_s, seed=seed)
    sessions = [Session([requests[number % len(requests)]]) for number in range(count)]
    timings = await run_open(target, sessions, arrivals_s)
    report = LoadReport.of(timings)
    _check(report)
    refused = [t for t in timings if t.failure is not None and t.failure.is_refusal]
    return OpenLoop(
        offered_per_s=rate_per_s,
        report=report,
        refusal_s=Percentiles.of([timing.e2e_s for timing in refused]),
        retry_after_s=Percentiles.of(target.hints_s),
    )


def _check(report: LoadReport) -> None:
    if report.num_failed or not report.num_complete:
        raise OverloadError(f"a request failed that should not: {report.errors[0]}")


def _table(
    capacity_per_s: float,
    factor: float,
    unloaded: OpenLoop,
    overload: OpenLoop,
    memory: dict[str, MemoryReport],
) -> str:
    lines = [
        f"capacity with every slot busy: {capacity_per_s:.1f} requests/s",
        _HEAD,
        _row("unloaded", unloaded),
        _row(f"{factor:g}x", overload),
        "times in ms, from when a request was due; late: how late the load generator sent it",
    ]
    for name in ("ttft_s", "e2e_s"):
        base, loaded = getattr(unloaded.report, name), getattr(overload.report, name)
        lines.append(
            f"{name.removesuffix('_s').upper()} under overload / unloaded: "
            f"p50 {loaded.p50 / base.p50:.2f}, p99 {loaded.p99 / base.p99:.2f}"
        )
    for name, report in memory.items():
        lines.append(
            f"memory of the {name}: {report.samples_mib[0]:.0f} MiB at first, "
            f"{max(report.samples_mib):.0f} at most, {report.samples_mib[-1]:.0f} at last, growth "
            f"after the first quarter {report.growth_mib:+.1f}"
        )
    return "\n".join(lines)


def _row(name: str, run: OpenLoop) -> str:
    report = run.report
    return (
        f"{name:<11}{run.offered_per_s:>8.1f}{run.served_per_s:>9.1f}{report.num_refused:>9}"
        + _ms(report.ttft_s, 10)
        + _ms(report.e2e_s, 9)
        + _ms(run.refusal_s, 13)
        + _ms(run.retry_after_s, 10)
        + ("" if report.send_delay_s is None else f"{report.send_delay_s.p99 * 1e3:>10.1f}")
    )


def _ms(values: Percentiles | None, width: int) -> str:
    """The median in `width` and the 99th percentile in eight characters."""
    if values is None:
        return f"{'n/a':>{width}}{'n/a':>8}"
    return f"{values.p50 * 1e3:>{width}.1f}{values.p99 * 1e3:>8.1f}"


if __name__ == "__main__":
    sys.exit(main())
