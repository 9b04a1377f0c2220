"""Times each fused kernel against the unfused torch or cuBLAS form and the memory's limit.

    python -m benchmarks.kernels                       every kernel, default launches
    python -m benchmarks.kernels --sweep --only qkv    try launch.py's candidates, print the best
    python -m benchmarks.kernels --json results.json   keep the numbers, with machine and versions

Shapes are Qwen3-0.6B's, bfloat16. A measurement captures many launches in one CUDA graph and
divides the median replay by their number. Launches rotate over operand sets of 150 MB together,
three times the L2 cache of an H100, so that weights and caches come from memory as in a real step.
Every launch configuration is checked against the unfused form before it is timed.

`layers` is a whole chain: the 28 decoder layers of one decode step, once with ordinary launches and
once with programmatic dependent launches, where a kernel loads its weights while the one before
it drains.
"""

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from benchmarks.kernel_cases import all_cases
from benchmarks.kernel_timing import Result, measure, read_bandwidth_gb_per_s
from nanovllm_core.kernels.workspace import Workspace


def table_line(result: Result) -> str:
    unfused = "" if result.unfused_us is None else f"{result.unfused_us:9.2f}"
    speedup = "" if result.speedup is None else f"{result.speedup:6.2f}x"
    return (
        f"{result.kernel:19s} {result.shape:44s} {result.time_us:9.2f} {unfused:>9s} {speedup:>7s} "
        f"{result.num_bytes / 1e6:9.3f} {result.gb_per_s:8.1f} {result.bandwidth_share:6.1%} "
        f"{result.tflop_per_s:7.1f}  {result.config}"
    )


def machine() -> dict[str, str]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="kernels to time; default all")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64, 256, 4096])
    parser.add_argument("--sweep", action="store_true", help="try every launch candidate")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        print("benchmarks.kernels needs an NVIDIA GPU, and torch sees none", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    bandwidth = read_bandwidth_gb_per_s()
    print(f"{machine()}\nread bandwidth {bandwidth:.0f} GB/s")
    print(
        f"{'kernel':19s} {'shape':44s} {'us':>9s} {'unfused':>9s} {'ratio':>7s} {'MB':>9s} "
        f"{'GB/s':>8s} {'share':>6s} {'TFLOP/s':>7s}  launch"
    )
    workspace = Workspace.allocate(1 << 25, 1 << 16, torch.device("cuda"))
    results: list[Result] = []
    for build in all_cases(arguments.rows, workspace):
        case = build()
        if arguments.only and case.kernel not in arguments.only:
            continue
        found = list(measure(case, arguments.sweep, bandwidth))
        results += found
        for result in sorted(found, key=lambda r: r.time_us)[:3]:
            print(table_line(result), flush=True)
        del case
        torch.cuda.empty_cache()
    if arguments.json:
        document = {
            "machine": machine(),
            "read_bandwidth_gb_per_s": bandwidth,
            "results": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
