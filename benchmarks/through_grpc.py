"""Runs workloads through the public API, as any client would."""

import argparse
import asyncio
from dataclasses import asdict
from typing import Any

from benchmarks.executor_counters import ExecutorCounters
from benchmarks.options import workloads
from benchmarks.report import Result, Run, check_run
from benchmarks.workloads import Workload
from nanovllm.aio import AsyncClient
from nanovllm.load import GrpcTarget, LoadReport, LoadRequest, run_load
from nanovllm.sampling_params import SamplingParams


async def measure(
    address: str, options: argparse.Namespace, executor_metrics_url: str | None
) -> tuple[list[Result], dict[str, Any]]:
    """Runs every workload that `options` names against the server at `address`.

    Returns:
        The results, and what the server says of itself.

    Raises:
        ValueError: A workload does not exist or does not fit the server.
        RequestsFailedError: A request failed.
        NanovllmError: The server does not answer.
    """
    async with AsyncClient(address, share_call=options.share_call) as client:
        info = await client.model_info()
        results = []
        for workload in workloads(options, info.vocab_size, info.max_model_len):
            runs = []
            for number in range(0 if options.no_warm_up else -1, options.runs):
                # A cache of its own: prefixes of an earlier run must not help the next.
                target = GrpcTarget(client, cache_salt=f"{workload.name} {number}")
                run = await _run(target, workload, not options.no_text, executor_metrics_url)
                if number >= 0:
                    runs.append(run)
            results.append(Result(workload, runs))
        # After the runs: at first the scheduler may not have met its executor yet.
        status = await client.server_status()
        server = {
            "model": {
                "name": info.model_name,
                "architecture": info.architecture,
                "max_model_len": info.max_model_len,
                "vocab_size": info.vocab_size,
                "fingerprint": info.fingerprint,
            },
            "status_after": asdict(status),
        }
    return results, server


async def _run(
    target: GrpcTarget, workload: Workload, text: bool, executor_metrics_url: str | None
) -> Run:
    requests = load_requests(workload, text)
    before = await _counters(executor_metrics_url)
    timings = await run_load(target, requests, len(requests))
    after = await _counters(executor_metrics_url)
    report = check_run(workload, LoadReport.of(timings))
    return Run(report, None if before is None or after is None else after.since(before))


def load_requests(workload: Workload, text: bool) -> list[LoadRequest]:
    """The requests of a workload; a model's own sampling defaults do not apply."""
    return [
        LoadRequest(
            request.prompt_token_ids,
            SamplingParams(
                temperature=workload.temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                repetition_penalty=1.0,
                max_tokens=request.max_tokens,
                ignore_eos=True,
                detokenize=text,
            ),
        )
        for request in workload.requests
    ]


async def _counters(url: str | None) -> ExecutorCounters | None:
    return None if url is None else await asyncio.to_thread(ExecutorCounters.fetch, url)
