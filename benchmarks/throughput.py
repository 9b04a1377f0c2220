"""Throughput and latency through gRPC, from a client in a process of its own.

    python -m benchmarks.throughput --model Qwen/Qwen3-0.6B --executor-arg=--max-model-len=4096
    python -m benchmarks.throughput --address 127.0.0.1:50051 --executor-metrics URL
    python -m benchmarks.throughput --scale 0.1 --runs 5          on a small machine

Without --address it starts both services for --model on loopback ports and stops them at the end.
Each workload runs once to warm up and then --runs times, each time with a prefix cache of its own.
All requests of a workload are sent at once. Text is on, as it is for users.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.machine import describe_machine, machine_line
from benchmarks.options import add_engine_options, add_workload_options
from benchmarks.report import RequestsFailedError, Result, format_table, write_json
from benchmarks.through_grpc import measure
from nanovllm.errors import NanovllmError
from nanovllm.model_store import ModelNotFoundError
from nanovllm.services import EXECUTOR_MODULE, LocalServices, ServiceStartError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    machine = describe_machine()
    try:
        results, server = _measure(options)
    except (
        ValueError,
        RequestsFailedError,
        NanovllmError,
        ModelNotFoundError,
        ServiceStartError,
    ) as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 1
    executor = server["status_after"]["executor"] or {}
    print(
        f"{server['model']['name']} through gRPC, {executor.get('dtype')} on "
        f"{executor.get('device')}, attention {executor.get('attention_backend')}, "
        f"text {'off' if options.no_text else 'on'}, scale {options.scale:g}, "
        f"{'one call for all requests' if options.share_call else 'a call for each request'}"
    )
    print(machine_line(machine))
    print(format_table(results))
    if options.json is not None:
        document = {
            "path": "grpc",
            "machine": machine,
            "server": server,
            "parameters": {
                name: getattr(options, name)
                for name in ("scale", "runs", "no_warm_up", "no_text", "address", "share_call")
            }
            | {"executor_args": options.executor_arg, "scheduler_args": options.scheduler_arg},
            "results": [result.as_dict() for result in results],
        }
        write_json(options.json, document)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput",
        description="Measures throughput and latency through gRPC.",
    )
    parser.add_argument("--address", metavar="HOST:PORT", help="a running scheduler")
    parser.add_argument(
        "--executor-metrics",
        metavar="URL",
        help="/metrics of the executor behind --address, for its idle time",
    )
    parser.add_argument(
        "--no-text", action="store_true", help="token ids only: the server does not detokenize"
    )
    parser.add_argument(
        "--share-call",
        action="store_true",
        help="all requests in one call of GenerateMany instead of one of Generate each",
    )
    add_engine_options(parser)
    add_workload_options(parser)
    return parser


def _measure(options: argparse.Namespace) -> tuple[list[Result], dict[str, Any]]:
    if options.address is not None:
        return asyncio.run(measure(options.address, options, options.executor_metrics))
    with LocalServices(
        options.model,
        executor_args=options.executor_arg,
        # A workload that is sent at once is meant to queue.
        scheduler_args=options.scheduler_arg,
        listen="tcp",
        metrics=True,
        executor_module="benchmarks.simulated_executor"
        if options.simulated_device
        else EXECUTOR_MODULE,
    ) as services:
        return asyncio.run(measure(services.address, options, services.executor.metrics_url))


if __name__ == "__main__":
    sys.exit(main())
