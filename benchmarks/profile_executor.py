"""Which kernels a decode iteration spends its time in, and how much of it the device idles.

    python -m benchmarks.profile_executor --model DIRECTORY --streams 64 --trace traces

Drives the executor in process (`benchmarks.in_process`) and profiles a few iterations in the middle
of decoding. Without a GPU it profiles the CPU operators of the worker thread instead.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.device_profile import DeviceProfile, ProfilingRunner
from benchmarks.in_process import InProcessEngine, load_engine
from benchmarks.machine import describe_machine, machine_line
from benchmarks.options import add_engine_options
from benchmarks.report import RequestsFailedError, write_json
from benchmarks.workloads import Request, Workload
from executor_service.engine_factory import Engine
from executor_service.plan_reader import ExecutorLimits
from nanovllm.cli.options import positive_int
from nanovllm.model_store import ModelNotFoundError
from nanovllm.service_settings import StartupError
from scheduler_service.scheduler import SchedulerPolicy

_DEFAULT_STREAMS = (1, 64)
_TEMPERATURE = 0.6
_NAME_WIDTH = 56


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_executor",
        description="Profiles decode iterations of the executor, kernel by kernel.",
    )
    add_engine_options(parser)
    parser.add_argument(
        "--streams",
        action="append",
        type=positive_int,
        metavar="N",
        help=f"sequences that decode; repeatable (default: {_DEFAULT_STREAMS})",
    )
    parser.add_argument("--prompt-len", type=positive_int, default=128, metavar="TOKENS")
    parser.add_argument(
        "--iterations", type=positive_int, default=20, metavar="N", help="that are profiled"
    )
    parser.add_argument(
        "--warm-up", type=positive_int, default=20, metavar="N", help="iterations before them"
    )
    parser.add_argument("--rows", type=positive_int, default=25, help="of each table")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="write Chrome traces here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    options = parser.parse_args(arguments)
    machine = describe_machine()
    try:
        engine, policy = load_engine(options)
        print(
            f"{options.model} in process, {engine.dtype_name} on {engine.device_name}, attention "
            f"{engine.attention_backend}, prompts of {options.prompt_len} tokens"
        )
        print(machine_line(machine))
        profiles = [
            _profile(engine, policy, num_streams, options)
            for num_streams in options.streams or _DEFAULT_STREAMS
        ]
    except (ValueError, RequestsFailedError, ModelNotFoundError, StartupError) as error:
        print(f"profile_executor: {error}", file=sys.stderr)
        return 1
    if options.json is not None:
        document = {
            "machine": machine | {"device": engine.device_name},
            "parameters": {
                name: getattr(options, name)
                for name in ("model", "prompt_len", "iterations", "warm_up")
            }
            | {"executor_args": options.executor_arg, "scheduler_args": options.scheduler_arg},
            "dtype": engine.dtype_name,
            "attention_backend": engine.attention_backend,
            "profiles": [profile.as_dict() for profile in profiles],
        }
        write_json(options.json, document)
    return 0


def _profile(
    engine: Engine, policy: SchedulerPolicy, num_streams: int, options: argparse.Namespace
) -> DeviceProfile:
    """Profiles and prints one number of streams."""
    num_steps = options.warm_up + 2 * options.iterations
    workload = _workload(engine.limits, num_streams, options.prompt_len, num_steps)
    runner = ProfilingRunner(
        engine.runner,
        engine.state.device,
        num_streams=num_streams,
        num_warm_up=options.warm_up,
        num_iterations=options.iterations,
    )
    with InProcessEngine(replace(engine, runner=runner), policy, options.model) as in_process:
        in_process.run(workload, workload.name)
    trace = None
    if options.trace is not None:
        options.trace.mkdir(parents=True, exist_ok=True)
        trace = options.trace / f"{workload.name}.json"
    profile = runner.profile(trace)
    print(_format(profile, options.rows))
    return profile


def _workload(
    limits: ExecutorLimits, num_streams: int, prompt_len: int, num_steps: int
) -> Workload:
    """Requests that all decode together for at least `num_steps` iterations.

    Raises:
        ValueError: The executor cannot hold them at once.
    """
    if num_streams > limits.max_num_seqs:
        raise ValueError(
            f"{num_streams} streams do not fit --max-num-seqs {limits.max_num_seqs}; raise it with "
            "--executor-arg=--max-num-seqs=N"
        )
    # The first to decode must not end before the last one has its prompt computed, with a plan of
    # prefill chunks in every other iteration at least.
    prefill_budget = limits.max_num_batched_tokens - num_streams
    num_prefill_steps = -(-num_streams * prompt_len // prefill_budget)
    max_tokens = 2 * num_prefill_steps + num_steps + 16
    length = prompt_len + max_tokens
    blocks = num_streams * -(-length // limits.block_size)
    if length > limits.max_model_len or blocks > limits.num_blocks:
        raise ValueError(
            f"{num_streams} streams of {length} tokens need {blocks} KV blocks and a model length "
            f"of {length}; the executor has {limits.num_blocks} and {limits.max_model_len}; lower "
            "--streams, --prompt-len, --iterations or --warm-up"
        )
    generator = random.Random(num_streams)
    requests = [
        Request([generator.randrange(limits.vocab_size) for _ in range(prompt_len)], max_tokens)
        for _ in range(num_streams)
    ]
    return Workload(f"streams{num_streams}", requests, _TEMPERATURE)


def _format(profile: DeviceProfile, max_rows: int) -> str:
    """The profile as text."""
    shown, rest = profile.activities[:max_rows], profile.activities[max_rows:]
    columns = f"{'calls':>8}{'mean us':>10}{'us':>10}{'share':>8}"
    lines = [f"\n{profile.num_streams} streams, per iteration of {profile.num_iterations}"]
    lines.append(f"{profile.kind:<{_NAME_WIDTH}}{columns}")
    for item in shown:
        lines.append(
            f"{item.short_name[:_NAME_WIDTH]:<{_NAME_WIDTH}}{item.calls:>8.1f}{item.mean_us:>10.2f}"
            f"{item.total_us:>10.1f}{item.total_us / profile.sum_us:>8.1%}"
        )
    if rest:
        rest_us = sum(item.total_us for item in rest)
        lines.append(
            f"{f'{len(rest)} others':<{_NAME_WIDTH}}{sum(item.calls for item in rest):>8.1f}"
            f"{'':>10}{rest_us:>10.1f}{rest_us / profile.sum_us:>8.1%}"
        )
    for label, value_us in (
        ("sum", profile.sum_us),
        ("busy, overlaps counted once", profile.busy_us),
        ("wall while profiled", profile.profiled_wall_us),
        ("wall without the profiler", profile.wall_us),
    ):
        lines.append(f"{label:<{_NAME_WIDTH}}{value_us:>28.1f}")
    lines.append(
        f"idle: {profile.idle_share:.1%} of the wall without the profiler, "
        f"{profile.profiled_idle_share:.1%} of the profiled one, whose launches are slower"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
