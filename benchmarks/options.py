"""Command line options that several benchmarks share."""

import argparse
from pathlib import Path

from benchmarks.workloads import Workload, make_workload
from nanovllm.cli.options import positive_int

_DEFAULT_WORKLOADS = ("bench256", "streams1", "streams8", "streams64")


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Adds --workload, --scale, --runs, --no-warm-up and --json."""
    parser.add_argument(
        "--workload",
        action="append",
        default=[],
        metavar="NAME",
        help=f"bench256 or streamsN; repeatable (default: {', '.join(_DEFAULT_WORKLOADS)})",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="F",
        help=(
            "in (0, 1]: bench256 keeps this share of its requests, and every prompt and output "
            "this share of its length (default: 1)"
        ),
    )
    parser.add_argument("--runs", type=positive_int, default=3, metavar="N")
    parser.add_argument(
        "--no-warm-up", action="store_true", help="measure the first run of each workload too"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --simulated-device, --executor-arg and --scheduler-arg."""
    parser.add_argument("--model", default="smollm2-135m-instruct", metavar="M")
    parser.add_argument(
        "--simulated-device",
        action="store_true",
        help="run no model: a device that only takes time, see benchmarks/simulated_executor.py",
    )
    parser.add_argument(
        "--executor-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="argument for the executor, written --executor-arg=--max-model-len=4096; repeatable",
    )
    parser.add_argument(
        "--scheduler-arg",
        action="append",
        default=[],
        metavar="ARG",
        help="argument for the scheduler; repeatable",
    )


def workloads(options: argparse.Namespace, vocab_size: int, max_model_len: int) -> list[Workload]:
    """The workloads that the options name, for one model.

    Raises:
        ValueError: One does not exist or does not fit the model's length.
    """
    chosen = [
        make_workload(name, options.scale).for_vocabulary(vocab_size)
        for name in options.workload or _DEFAULT_WORKLOADS
    ]
    for workload in chosen:
        if workload.longest > max_model_len:
            raise ValueError(
                f"{workload.name} has requests of {workload.longest} tokens, the server takes "
                f"{max_model_len}; lower --scale or serve a longer model length"
            )
    return chosen
