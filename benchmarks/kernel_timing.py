"""How the kernel benchmark measures: one launch against another, out of the cache, in a graph."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

ROTATION_BYTES = 150 << 20
MAX_SETS = 64
LAUNCHES = 60
REPLAYS = 30
# Relative Frobenius error against the unfused bfloat16 form, which itself rounds twice as often.
MAX_ERROR = 2e-2

Launch = Callable[[], Tensor]


@dataclass(slots=True)
class Case:
    """One kernel at one shape.

    `fused` and `unfused` build one launch for one operand set; `config` is what a sweep varies.
    `compare` is false where outputs are random draws or change in place from launch to launch.
    """

    kernel: str
    shape: str
    num_bytes: int
    operands: Callable[[], Any]
    fused: Callable[[Any, Any], Launch]
    unfused: Callable[[Any], Launch] | None = None
    candidates: Sequence[Any] = field(default_factory=tuple)
    compare: bool = True
    flops: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    kernel: str
    shape: str
    config: str
    time_us: float
    num_bytes: int
    gb_per_s: float
    bandwidth_share: float
    tflop_per_s: float
    unfused_us: float | None
    speedup: float | None


def graph_time_us(launches: Sequence[Launch]) -> float:
    """Median time of one launch, from a CUDA graph that walks `launches` in turn."""
    for one in launches[:2]:
        one()
    torch.cuda.synchronize()
    count = max(1, LAUNCHES // len(launches)) * len(launches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(count):
            launches[index % len(launches)]()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / count)
    return statistics.median(times)


def read_bandwidth_gb_per_s() -> float:
    """What a plain sum over 4 GB reads per second."""
    data = torch.ones(1 << 30, dtype=torch.float32, device="cuda")
    return data.numel() * 4 / graph_time_us([lambda: data.sum()]) / 1e3


def relative_error(out: Tensor, reference: Tensor) -> float:
    difference = (out.float() - reference.float()).norm()
    return (difference / reference.float().norm()).item()


def measure(case: Case, sweep: bool, bandwidth: float) -> Iterator[Result]:
    num_sets = min(MAX_SETS, max(1, -(-ROTATION_BYTES // case.num_bytes)))
    sets = [case.operands() for _ in range(num_sets)]
    unfused_us = None
    if case.unfused is not None:
        unfused_us = graph_time_us([case.unfused(operands) for operands in sets])
    for config in case.candidates if sweep and case.candidates else (None,):
        name = "default" if config is None else str(config)
        try:
            if case.compare and case.unfused is not None:
                error = relative_error(case.fused(sets[0], config)(), case.unfused(sets[0])())
                if not error <= MAX_ERROR:
                    print(f"WRONG    {case.kernel} {case.shape} {name}: error {error:.1e}")
                    continue
            time_us = graph_time_us([case.fused(operands, config) for operands in sets])
        except triton.runtime.errors.OutOfResources as error:
            print(f"too big  {case.kernel} {case.shape} {name}: {error}")
            continue
        gb_per_s = case.num_bytes / time_us / 1e3
        yield Result(
            kernel=case.kernel,
            shape=case.shape,
            config=name,
            time_us=time_us,
            num_bytes=case.num_bytes,
            gb_per_s=gb_per_s,
            bandwidth_share=gb_per_s / bandwidth,
            tflop_per_s=case.flops / time_us / 1e6,
            unfused_us=unfused_us,
            speedup=None if unfused_us is None else unfused_us / time_us,
        )
