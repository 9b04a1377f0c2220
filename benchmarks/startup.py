"""How long both services take from nothing to ready, with and without compiled kernels.

    python -m benchmarks.startup --model Qwen/Qwen3-0.6B --executor-arg=--max-model-len=4096

The first start finds an empty kernel cache of its own (TRITON_CACHE_DIR), the others what the first
has compiled. On a CPU there is nothing to compile, and all starts are alike.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import describe_machine, machine_line
from benchmarks.options import add_engine_options
from benchmarks.report import write_json
from nanovllm.cli.options import positive_int
from nanovllm.model_store import ModelNotFoundError
from nanovllm.services import EXECUTOR_MODULE, LocalServices, ServiceStartError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup", description="Measures the time from start to ready."
    )
    add_engine_options(parser)
    parser.add_argument(
        "--runs", type=positive_int, default=3, metavar="N", help="starts with compiled kernels"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(arguments)
    machine = describe_machine()
    print(machine_line(machine))
    times: list[float] = []
    with tempfile.TemporaryDirectory(prefix="nanovllm-kernels-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for run in range(1 + options.runs):
            try:
                times.append(_time_start_s(options))
            except (ModelNotFoundError, ServiceStartError) as error:
                print(f"startup: {error}", file=sys.stderr)
                return 1
            print(f"{times[-1]:7.1f} s  {'warm' if run else 'cold'} kernel cache", flush=True)
    if options.json is not None:
        parameters = {
            "model": options.model,
            "executor_args": options.executor_arg,
            "scheduler_args": options.scheduler_arg,
        }
        figures = {"cold_s": times[0], "warm_s": times[1:]}
        write_json(options.json, {"machine": machine, "parameters": parameters} | figures)
    return 0


def _time_start_s(options: argparse.Namespace) -> float:
    begin = time.monotonic()
    with LocalServices(
        options.model,
        executor_args=options.executor_arg,
        scheduler_args=options.scheduler_arg,
        listen="tcp",
        executor_module="benchmarks.simulated_executor"
        if options.simulated_device
        else EXECUTOR_MODULE,
    ):
        return time.monotonic() - begin


if __name__ == "__main__":
    sys.exit(main())
