"""What a GPU pays between two dependent pieces of work, whatever they compute.

    python -m benchmarks.launch_cost

Three questions behind the design of a decode step with few rows, all asked in CUDA graphs:

- What does the boundary between two kernels cost, with and without programmatic dependent launch?
- What would a barrier over all blocks of one persistent kernel cost instead?
- How long do a layer's four linear kernels take when their weights come from the L2 cache, and how
  long when they come from memory? The difference is what memory still costs.
"""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.machine import describe_machine, machine_line
from benchmarks.report import write_json
from nanovllm_core.kernels.device import launch_next, wait_for_previous
from nanovllm_core.kernels.launch import launch_options
from nanovllm_core.kernels.linear_residual import linear_residual
from nanovllm_core.kernels.rms_norm_linear import rms_norm_linear
from nanovllm_core.kernels.silu_mul_linear import silu_mul_linear
from nanovllm_core.kernels.workspace import Workspace

_HIDDEN, _QKV, _ATTENDED, _FFN = 1024, 4096, 2048, 3072
_KERNELS = 140
_BARRIERS = 200
_LAYERS = 32
# Sets of weights that together do not fit into the L2 cache.
_WEIGHT_SETS = 8
_REPEATS = 20


@triton.jit
def _small_kernel(x_ptr, y_ptr, DEPENDENT: tl.constexpr):
    launch_next(DEPENDENT)
    wait_for_previous(DEPENDENT)
    index = tl.program_id(0) * 32 + tl.arange(0, 32)
    tl.store(y_ptr + index, tl.load(x_ptr + index) + 1.0)


@triton.jit
def _load_acquire(ptr):
    return tl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u32 $0, [$1];",
        "=r,l",
        [ptr],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _barriers_kernel(counter_ptr, rounds):
    """All blocks meet `rounds` times; they must all be resident at once."""
    for number in range(rounds):
        tl.debug_barrier()
        tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
        target = (number + 1) * tl.num_programs(0)
        seen = _load_acquire(counter_ptr)
        while seen < target:
            seen = _load_acquire(counter_ptr)
        tl.debug_barrier()


def _time_us(work: Callable[[], None]) -> float:
    """Median time of a replay of `work`."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def _boundaries(blocks: int) -> Iterator[tuple[str, float]]:
    buffers = [torch.zeros(32 * blocks, device="cuda") for _ in range(2)]
    for dependent in (False, True):

        def work(dependent: bool = dependent) -> None:
            for number in range(_KERNELS):
                source, target = buffers[number % 2], buffers[1 - number % 2]
                _small_kernel[(blocks,)](
                    source, target, DEPENDENT=dependent, **launch_options(1, 1, dependent)
                )

        kind = "dependent launch" if dependent else "plain launch"
        yield f"kernel boundary, {kind}, {blocks} blocks", _time_us(work) / _KERNELS


def _barriers(blocks: int) -> Iterator[tuple[str, float]]:
    counter = torch.zeros(1, dtype=torch.int32, device="cuda")

    def work() -> None:
        counter.zero_()
        _barriers_kernel[(blocks,)](counter, _BARRIERS, num_warps=4)

    yield f"barrier in one kernel, {blocks} blocks", _time_us(work) / _BARRIERS


def _linear_kernels(rows: int) -> Iterator[tuple[str, float]]:
    def random(*shape: int) -> torch.Tensor:
        return (0.02 * torch.randn(*shape, device="cuda")).to(torch.bfloat16)

    hidden, attended = random(rows, _HIDDEN), random(rows, _ATTENDED)
    workspace = Workspace.allocate(1 << 22, 1 << 12, torch.device("cuda"))
    sets = [
        (
            random(_QKV, _HIDDEN),
            random(_HIDDEN, _ATTENDED),
            random(2 * _FFN, _HIDDEN),
            random(_HIDDEN, _FFN),
        )
        for _ in range(_WEIGHT_SETS)
    ]
    for place, num_sets in (("L2 cache", 1), ("memory", _WEIGHT_SETS)):

        def work(num_sets: int = num_sets) -> None:
            for layer in range(_LAYERS):
                qkv, output, gate_up, down = sets[layer % num_sets]
                rms_norm_linear(hidden, qkv, 1e-6, dependent=True)
                linear_residual(attended, output, hidden, workspace, dependent=True)
                gated = silu_mul_linear(hidden, gate_up, eps=1e-6, dependent=True)
                linear_residual(gated, down, hidden, workspace, dependent=True)

        name = f"four linear kernels, {rows} rows, weights from {place}"
        yield name, _time_us(work) / _LAYERS


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9:
        print("benchmarks.launch_cost needs an NVIDIA GPU from Hopper on", file=sys.stderr)
        return 2
    machine = describe_machine()
    print(machine_line(machine))
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    results: list[dict[str, Any]] = []
    for measured in (
        _boundaries(num_sms),
        _boundaries(4 * num_sms),
        _barriers(num_sms),
        _barriers(2 * num_sms),
        _linear_kernels(1),
        _linear_kernels(8),
    ):
        for name, time_us in measured:
            results.append({"what": name, "us": time_us})
            print(f"{time_us:8.2f} us  {name}", flush=True)
    if arguments.json is not None:
        write_json(arguments.json, {"machine": machine, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
