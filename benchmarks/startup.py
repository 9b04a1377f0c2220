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
from nanovllm import Client, NanovllmError
from nanovllm.cli.options import positive_int
from nanovllm.model_store import ModelNotFoundError
from nanovllm.services import EXECUTOR_MODULE, LocalServices, ServiceStartError

_CONNECT_LIMIT_S = 10.0


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
    device: str | None = None
    with tempfile.TemporaryDirectory(prefix="nanovllm-kernels-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for run in range(1 + options.runs):
            try:
                time_s, device = _start(options)
            except (ModelNotFoundError, ServiceStartError, NanovllmError) as error:
                print(f"startup: {error}", file=sys.stderr)
                return 1
            times.append(time_s)
            cache_is = "warm" if run else "cold"
            print(f"{time_s:7.1f} s  {cache_is} kernel cache, {device}", flush=True)
    if options.json is not None:
        parameters = {
            "model": options.model,
            "executor_args": options.executor_arg,
            "scheduler_args": options.scheduler_arg,
        }
        figures = {"cold_s": times[0], "warm_s": times[1:]}
        document = {"machine": machine | {"device": device}, "parameters": parameters}
        write_json(options.json, document | figures)
    return 0


def _start(options: argparse.Namespace) -> tuple[float, str | None]:
    """Starts and stops both services: seconds until they were ready, and the executor's device."""
    begin = time.monotonic()
    with LocalServices(
        options.model,
        executor_args=options.executor_arg,
        scheduler_args=options.scheduler_arg,
        listen="tcp",
        executor_module="benchmarks.simulated_executor"
        if options.simulated_device
        else EXECUTOR_MODULE,
    ) as services:
        time_s = time.monotonic() - begin
        with Client(services.address) as client:
            return time_s, _device(client)


def _device(client: Client) -> str | None:
    """What the executor runs on; None if the scheduler has not met it within seconds."""
    deadline_s = time.monotonic() + _CONNECT_LIMIT_S
    while time.monotonic() < deadline_s:
        executor = client.server_status().executor
        if executor is not None:
            return executor.device
        time.sleep(0.05)
    return None


if __name__ == "__main__":
    sys.exit(main())
