"""Our two services against transformers' `generate` on a CPU: same model, prompts and threads.

    python -m benchmarks.compare_transformers --dtype float32 --dtype bfloat16

One stream and a batch of eight, greedy, fixed output length. For the batch transformers gets one
padded `generate` call; our services get eight concurrent requests through gRPC, text included, as
they would from eight users. The two sides take turns; the idle side's processor time is recorded,
because it would slow down the other. Prompts have different lengths and are new in every round, so
no prefix cache helps.
"""

import argparse
import asyncio
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.machine import describe_machine, machine_line
from benchmarks.report import check_run, write_json
from benchmarks.through_grpc import load_requests
from benchmarks.workloads import Request, Workload
from nanovllm.aio import AsyncClient
from nanovllm.cli.options import positive_int
from nanovllm.load import GrpcTarget, LoadReport, run_load
from nanovllm.model_store import resolve_model
from nanovllm.services import LocalServices

_DTYPES = ("float32", "bfloat16")
_CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_HEAD = (
    f"{'dtype':<10}{'streams':>8}{'ours':>22}{'transformers':>22}{'ratio':>7}{'idle':>7}\n"
    "median (least-most) output tok/s; idle: cores that our services used meanwhile"
)
# A prompt of the padded batch is at least this share of the longest one.
_SHORTEST_PROMPT = 0.75


@dataclass(frozen=True, slots=True)
class Comparison:
    """Output tokens per second of both sides, one entry per round."""

    dtype: str
    num_streams: int
    ours: list[float]
    transformers: list[float]
    # Share of one core that our idle services used while transformers ran.
    idle_services_cpu: float

    @property
    def ratio(self) -> float:
        """Median of ours over median of theirs."""
        return statistics.median(self.ours) / statistics.median(self.transformers)


class TransformersSide:
    """transformers' own generation loop in this process."""

    def __init__(self, directory: Path, dtype: str) -> None:
        # transformers has no types.
        loader: Any = AutoModelForCausalLM
        self._model = loader.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()

    def run(self, workload: Workload) -> float:
        """Returns output tokens per second."""
        prompts = [request.prompt_token_ids for request in workload.requests]
        width = max(map(len, prompts))
        # Padding goes to the left, where generate() expects it.
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(item)) + [1] * len(item) for item in prompts])
        num_new = workload.requests[0].max_tokens
        start_s = time.perf_counter()
        output = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            min_new_tokens=num_new,
            max_new_tokens=num_new,
            pad_token_id=0,
            eos_token_id=None,
        )
        elapsed_s = time.perf_counter() - start_s
        if output.shape[1] != width + num_new:
            raise RuntimeError(f"transformers made {output.shape[1] - width} tokens, not {num_new}")
        return len(prompts) * num_new / elapsed_s


def make_workload(num_streams: int, input_len: int, output_len: int, seed: int) -> Workload:
    """Greedy requests with prompts of up to `input_len` random tokens."""
    generator = random.Random(seed)
    lengths = [input_len] + [
        generator.randint(max(1, round(input_len * _SHORTEST_PROMPT)), input_len)
        for _ in range(num_streams - 1)
    ]
    requests = [
        Request([generator.randrange(10_000) for _ in range(length)], output_len)
        for length in lengths
    ]
    return Workload(f"streams{num_streams}", requests, temperature=0.0)


def compare(options: argparse.Namespace, dtype: str) -> Iterator[Comparison]:
    """Measures one data type, one number of streams after the other."""
    theirs = TransformersSide(resolve_model(options.model), dtype)
    with LocalServices(
        options.model,
        executor_args=["--device=cpu", f"--dtype={dtype}", f"--num-threads={options.threads}"],
        listen="tcp",
    ) as services:
        for num_streams in options.streams:
            yield _compare_streams(options, dtype, num_streams, theirs, services)


def _compare_streams(
    options: argparse.Namespace,
    dtype: str,
    num_streams: int,
    theirs: TransformersSide,
    services: LocalServices,
) -> Comparison:
    pids = (services.executor.pid, services.scheduler.pid)
    our_rates, their_rates = [], []
    idle_cpu_s = their_time_s = 0.0

    def run_ours(workload: Workload) -> None:
        our_rates.append(asyncio.run(_run_ours(services.address, workload)))

    def run_theirs(workload: Workload) -> None:
        nonlocal idle_cpu_s, their_time_s
        before_s, start_s = sum(map(_cpu_time_s, pids)), time.perf_counter()
        their_rates.append(theirs.run(workload))
        their_time_s += time.perf_counter() - start_s
        idle_cpu_s += sum(map(_cpu_time_s, pids)) - before_s

    for number in range(-1, options.rounds):
        if number == 0:
            # The round before was for warming up.
            our_rates.clear()
            their_rates.clear()
            idle_cpu_s = their_time_s = 0.0
        workload = make_workload(num_streams, options.input_len, options.output_len, number)
        sides = (run_ours, run_theirs) if number % 2 else (run_theirs, run_ours)
        for run in sides:
            run(workload)
    return Comparison(dtype, num_streams, our_rates, their_rates, idle_cpu_s / their_time_s)


async def _run_ours(address: str, workload: Workload) -> float:
    async with AsyncClient(address) as client:
        requests = load_requests(workload, text=True)
        timings = await run_load(GrpcTarget(client), requests, len(requests))
    return check_run(workload, LoadReport.of(timings)).output_tokens_per_s


def _cpu_time_s(pid: int | None) -> float:
    """User and system time of a process so far."""
    if pid is None:
        raise RuntimeError("a service has ended")
    # The name in field 2 may hold spaces; what follows its parenthesis does not.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK_TICKS_PER_S


def format_row(item: Comparison) -> str:
    """A row below `_HEAD`."""
    return (
        f"{item.dtype:<10}{item.num_streams:>8}{_spread(item.ours):>22}"
        f"{_spread(item.transformers):>22}{item.ratio:>7.2f}{item.idle_services_cpu:>7.1%}"
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare_transformers",
        description="Compares both services with transformers' generate on a CPU.",
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", metavar="M")
    parser.add_argument("--dtype", action="append", default=[], choices=_DTYPES)
    parser.add_argument("--streams", action="append", default=[], type=positive_int, metavar="N")
    parser.add_argument("--input-len", type=positive_int, default=64, metavar="N")
    parser.add_argument("--output-len", type=positive_int, default=128, metavar="N")
    parser.add_argument("--rounds", type=positive_int, default=5, metavar="N")
    parser.add_argument(
        "--threads",
        type=positive_int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="PyTorch's threads on either side (default: all cores)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(arguments)
    options.streams = options.streams or [1, 8]
    torch.set_num_threads(options.threads)
    machine = describe_machine()
    print(
        f"{options.model}, {options.input_len} tokens in, {options.output_len} out, "
        f"{options.threads} threads"
    )
    print(machine_line(machine))
    print(_HEAD, flush=True)
    comparisons = []
    for dtype in options.dtype or _DTYPES:
        for comparison in compare(options, dtype):
            print(format_row(comparison), flush=True)
            comparisons.append(comparison)
    if options.json is not None:
        parameters = vars(options) | {"json": str(options.json)}
        write_json(
            options.json,
            {
                "machine": machine,
                "parameters": parameters,
                "comparisons": [asdict(item) | {"ratio": item.ratio} for item in comparisons],
            },
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
