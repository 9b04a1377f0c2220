"""The price of the split: throughput through gRPC over throughput of the same engine in process.

    python -m benchmarks.split_price --model Qwen/Qwen3-0.6B --workload streams64 --rounds 3

Each round runs `benchmarks.throughput` with a call for each request, the same with one call for all
of them, and `benchmarks.in_process`, each in a process of its own and in alternating order, so that
only one of them holds the device and a drift of the machine hits all. Text is made through gRPC, as
for users, unless --no-text is given.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine, machine_line
from benchmarks.options import add_engine_options, add_workload_options
from benchmarks.report import write_json
from nanovllm.cli.options import positive_int

_GRPC = "benchmarks.throughput"
_IN_PROCESS = "in process"
# What is compared: a module and arguments of its own.
_SIDES = {
    "a call each": (_GRPC, ()),
    "one call": (_GRPC, ("--share-call",)),
    _IN_PROCESS: ("benchmarks.in_process", ()),
}
_ROOT = Path(__file__).resolve().parent.parent


class MeasurementFailedError(RuntimeError):
    """One of the sides failed; what it said is on stderr."""


def measure(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs one side and returns its JSON.

    Raises:
        MeasurementFailedError: It failed.
    """
    module, own_arguments = _SIDES[side]
    with tempfile.TemporaryDirectory(prefix="nanovllm-bench-") as folder:
        path = Path(folder) / "result.json"
        command = [sys.executable, "-m", module, "--json", str(path), "--model", options.model]
        command += own_arguments
        command += ["--scale", str(options.scale), "--runs", str(options.runs)]
        for flag, values in (
            ("--workload", options.workload),
            ("--executor-arg", options.executor_arg),
            ("--scheduler-arg", options.scheduler_arg),
        ):
            command += [f"{flag}={value}" for value in values]
        if options.simulated_device:
            command.append("--simulated-device")
        if options.no_warm_up:
            command.append("--no-warm-up")
        if options.no_text and module == _GRPC:
            command.append("--no-text")
        finished = subprocess.run(command, cwd=_ROOT, stdout=subprocess.DEVNULL, check=False)
        if finished.returncode:
            raise MeasurementFailedError(
                f"{module} ({side}) ended with status {finished.returncode}"
            )
        document: dict[str, Any] = json.loads(path.read_text())
        return document


def rates(documents: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Median output tokens per second over the rounds, by workload."""
    found: dict[str, list[float]] = {}
    for document in documents:
        for result in document["results"]:
            found.setdefault(result["workload"], []).append(result["output_tokens_per_s"])
    return {name: statistics.median(values) for name, values in found.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.split_price",
        description="Compares throughput through gRPC with the same engine in one process.",
    )
    parser.add_argument("--rounds", type=positive_int, default=3, metavar="N")
    parser.add_argument("--no-text", action="store_true", help="do not make text through gRPC")
    add_engine_options(parser)
    add_workload_options(parser)
    options = parser.parse_args(arguments)
    machine = describe_machine()
    documents: dict[str, list[dict[str, Any]]] = {side: [] for side in _SIDES}
    try:
        for number in range(options.rounds):
            for side in list(_SIDES)[:: 1 if number % 2 == 0 else -1]:
                documents[side].append(measure(side, options))
    except MeasurementFailedError as error:
        print(f"split_price: {error}", file=sys.stderr)
        return 1
    found = {side: rates(documents[side]) for side in _SIDES}
    in_process = found[_IN_PROCESS]
    ratios = {
        side: {name: rate / in_process[name] for name, rate in through_grpc.items()}
        for side, through_grpc in found.items()
        if side != _IN_PROCESS
    }
    print(f"{options.model}, scale {options.scale:g}, output tok/s")
    print(machine_line(machine))
    print(f"{'workload':<12}" + "".join(f"{side:>13}{'ratio':>8}" for side in ratios), end="")
    print(f"{_IN_PROCESS:>13}")
    for name, rate in in_process.items():
        columns = (f"{found[side][name]:>13.1f}{ratios[side][name]:>8.3f}" for side in ratios)
        print(f"{name:<12}{''.join(columns)}{rate:>13.1f}")
    if options.json is not None:
        write_json(options.json, {"machine": machine, "ratios": ratios, "rounds": documents})
    return 0


if __name__ == "__main__":
    sys.exit(main())
