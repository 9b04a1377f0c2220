"""`nanovllm bench`: closed-loop load on a running server."""

import argparse
import asyncio
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from nanovllm.aio import AsyncClient
from nanovllm.cli.options import CommandError, add_address, positive_int
from nanovllm.load import LoadReport, LoadRequest, Percentiles, RequestTiming, run_load
from nanovllm.requests import Prompt
from nanovllm.sampling_params import SamplingParams
from nanovllm.server_info import ModelInfo

if TYPE_CHECKING:
    from nanovllm.cli.options import Commands


def add_command(commands: "Commands") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="measure latency and throughput",
        description=(
            "Keeps CONCURRENCY requests under way until NUM_REQUESTS are done and reports time to "
            "first token (TTFT), inter-token latency (ITL), latency of whole requests (E2E) and "
            "throughput. Every request generates exactly OUTPUT_LEN tokens."
        ),
    )
    add_address(parser)
    parser.add_argument("--num-requests", type=positive_int, default=64, metavar="N")
    parser.add_argument("--concurrency", type=positive_int, default=8, metavar="N")
    parser.add_argument(
        "--input-len", type=positive_int, default=128, metavar="N", help="random ids per prompt"
    )
    parser.add_argument("--output-len", type=positive_int, default=128, metavar="N")
    parser.add_argument("--prompt", metavar="TEXT", help="the same text for all, not random ids")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="default: 0")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random prompts")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report to FILE")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    report = asyncio.run(_measure(options))
    print(format_report(report))
    if options.json is not None:
        workload = {
            name: getattr(options, name)
            for name in (
                "num_requests",
                "concurrency",
                "input_len",
                "output_len",
                "prompt",
                "temperature",
                "seed",
            )
        }
        document = {"workload": workload, "report": report.as_dict()}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    if report.num_failed:
        raise CommandError(
            f"{report.num_failed} of {report.num_requests} requests failed: {report.errors[0]}"
        )
    return 0


async def _measure(options: argparse.Namespace) -> LoadReport:
    async with AsyncClient(options.address) as client:
        requests = _requests(options, await client.model_info())
        num_tokens = 0
        with tqdm(total=len(requests), desc="requests", disable=None) as bar:

            def on_done(timing: RequestTiming) -> None:
                nonlocal num_tokens
                num_tokens += timing.num_output_tokens
                elapsed_s = bar.format_dict["elapsed"]
                rate = num_tokens / elapsed_s if elapsed_s else 0.0
                bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
                bar.update()

            timings = await run_load(client, requests, options.concurrency, on_done=on_done)
    return LoadReport.of(timings)


def _requests(options: argparse.Namespace, info: ModelInfo) -> list[LoadRequest]:
    params = SamplingParams(
        temperature=options.temperature,
        seed=options.seed,
        max_tokens=options.output_len,
        ignore_eos=True,
    )
    if options.prompt is not None:
        return [LoadRequest(options.prompt, params)] * options.num_requests
    if options.input_len + options.output_len > info.max_model_len:
        raise CommandError(
            f"--input-len {options.input_len} and --output-len {options.output_len} exceed the "
            f"model's length of {info.max_model_len} tokens"
        )
    generator = random.Random(options.seed)

    def prompt() -> Prompt:
        return generator.choices(range(info.vocab_size), k=options.input_len)

    return [LoadRequest(prompt(), params) for _ in range(options.num_requests)]


def format_report(report: LoadReport) -> str:
    """Returns the report as text, latencies in milliseconds."""
    lines = [
        f"requests        {report.num_requests} ({report.num_failed} failed) "
        f"in {report.duration_s:.2f} s",
        f"prompt tokens   {report.num_prompt_tokens} ({report.num_cached_tokens} cached)",
        f"output tokens   {report.num_output_tokens}",
        f"throughput      {report.output_tokens_per_s:.1f} output tok/s",
        "latency (ms)         mean       p50       p95       p99",
        _latency_line("TTFT", report.ttft_s),
        _latency_line("ITL", report.itl_s),
        _latency_line("E2E", report.e2e_s),
    ]
    return "\n".join(lines)


def _latency_line(name: str, latency_s: Percentiles | None) -> str:
    if latency_s is None:
        return f"  {name:<13}{'no sample':>10}"
    values = (latency_s.mean, latency_s.p50, latency_s.p95, latency_s.p99)
    return f"  {name:<13}" + "".join(f"{value * 1e3:>10.2f}" for value in values)
