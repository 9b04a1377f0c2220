"""`nanovllm bench`: load on a running server; docs/benchmarking.md explains the figures."""

import argparse
import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nanovllm import __version__
from nanovllm.cli.bench_options import (
    API_KEY_VARIABLE,
    add_load_options,
    add_openai_options,
    add_report_options,
    add_workload_options,
)
from nanovllm.cli.bench_plan import Plan, ServerLimits, make_plan
from nanovllm.cli.connection import add_connection, connect_async
from nanovllm.cli.options import CommandError
from nanovllm.load.chart import run_charts
from nanovllm.load.report import LoadReport
from nanovllm.load.runner import OnDone, run_closed, run_open
from nanovllm.load.summary import format_report
from nanovllm.load.target import GrpcTarget, Target
from nanovllm.load.timeline import timeline
from nanovllm.load.timing import RequestTiming

if TYPE_CHECKING:
    from nanovllm.cli.options import Commands

_SERIES_INTERVAL_S = 1.0
_DESCRIPTION = """\
Sends requests and reports time to first token (TTFT), inter-token latency (ITL), time per output
token (TPOT), latency of whole requests (E2E), throughput and goodput. A closed loop keeps
CONCURRENCY users busy; with --rate or --trace it is an open loop, in which requests come when they
are due and latencies count from then. See docs/benchmarking.md.
"""


def add_command(commands: "Commands") -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "bench", help="measure latency and throughput", description=_DESCRIPTION
    )
    add_connection(parser)
    add_load_options(parser.add_argument_group("load"))
    add_workload_options(parser.add_argument_group("workload"))
    add_openai_options(parser.add_argument_group("other servers"))
    add_report_options(parser.add_argument_group("report"))
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    plan, target_info, timings = asyncio.run(_measure(options))
    report = LoadReport.of(timings, options.slo)
    print(format_report(report))
    if num_unsent := plan.num_requests - len(timings):
        print(f"not sent        {num_unsent} later turns of sessions that failed")
    charts = "" if options.no_plot else run_charts(timings)
    if charts and _can_print(charts):
        print(f"\n{charts}")
    if options.json is not None:
        document = {
            "tool": f"nanovllm bench {__version__}",
            "target": target_info,
            "config": plan.config,
            "report": report.as_dict(),
            "series_interval_s": _SERIES_INTERVAL_S,
            "series": [asdict(point) for point in timeline(timings, _SERIES_INTERVAL_S)],
            "requests": [timing.as_dict() for timing in timings],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    if report.num_failed or not report.num_complete:
        num_bad = report.num_requests - report.num_complete
        raise CommandError(
            f"{num_bad} of {report.num_requests} requests failed: {report.errors[0]}"
        )
    return 0


async def _measure(
    options: argparse.Namespace,
) -> tuple[Plan, dict[str, Any], list[RequestTiming]]:
    async with AsyncExitStack() as stack:
        if options.openai is None:
            if options.openai_model is not None or options.openai_body:
                raise CommandError("--openai-model and --openai-body need --openai")
            client = await stack.enter_async_context(
                connect_async(options, share_call=options.share_call)
            )
            info = await client.model_info()
            plan = make_plan(options, ServerLimits(info.vocab_size, info.max_model_len))
            target: Target = GrpcTarget(client, cache_salt=options.cache_salt)
            target_info = {
                "api": "nanovllm.v1",
                "model": info.model_name,
                "architecture": info.architecture,
                "fingerprint": info.fingerprint,
            }
        else:
            plan = make_plan(options, ServerLimits())
            target = await _openai_target(options, stack)
            target_info = {
                "api": "openai",
                "model": options.openai_model,
                "body": options.openai_body,
            }
        if plan.warmup:
            await run_closed(target, plan.warmup, plan.concurrency)
        with tqdm(total=plan.num_requests, desc="requests", disable=None) as bar:
            on_done = _progress(bar)
            if plan.arrivals_s is None:
                timings = await run_closed(target, plan.sessions, plan.concurrency, on_done=on_done)
            else:
                timings = await run_open(
                    target,
                    plan.sessions,
                    plan.arrivals_s,
                    max_outstanding=plan.max_outstanding,
                    on_done=on_done,
                )
    return plan, target_info, timings


async def _openai_target(options: argparse.Namespace, stack: AsyncExitStack) -> Target:
    if options.openai_model is None:
        raise CommandError("--openai needs --openai-model")
    try:
        # An optional extra; everybody else does without it.
        from nanovllm.load.openai_target import OpenAITarget
    except ImportError as error:
        raise CommandError(
            "--openai needs aiohttp; run pip install 'nanovllm-grpc[bench-openai]'"
        ) from error
    try:
        target = OpenAITarget(
            options.openai,
            options.openai_model,
            api_key=os.environ.get(API_KEY_VARIABLE),
            extra_body=options.openai_body,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    return await stack.enter_async_context(target)


def _progress(bar: "tqdm[Any]") -> OnDone:
    num_tokens = 0

    def on_done(timing: RequestTiming) -> None:
        nonlocal num_tokens
        num_tokens += timing.num_output_tokens
        elapsed_s = bar.format_dict["elapsed"]
        rate = num_tokens / elapsed_s if elapsed_s else 0.0
        bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)
        bar.update()

    return on_done


def _can_print(text: str) -> bool:
    """Whether the terminal's encoding has the characters."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True
