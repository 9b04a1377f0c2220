"""Device functions shared by several kernels."""

# Triton writes compile-time parameters in capitals.
# ruff: noqa: N803

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


def supports_dependent_launch(device: torch.device) -> bool:
    """Whether kernels may start while the one before them finishes (compute capability 9.0)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def start_dependents(DEPENDENT: tl.constexpr):
    """Order a programmatic dependent launch; nothing without one.

    The call waits for the kernel before to end, and lets the next kernel start. Before it a block
    may only read what no kernel writes (weights), and write nothing. Every block of every kernel
    of a chain calls it, which keeps the chain ordered: a kernel that has ended has seen its
    predecessor end.
    """
    if DEPENDENT:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def fence_weight_loads(DEPENDENT: tl.constexpr):
    """Separate a block's weight loads from everything that depends on the kernel before.

    Without a fence the compiler interleaves loads and arithmetic to save registers and keeps 3
    loads of a thread in flight instead of 8 (seen in the machine code for sm_90).
    """
    if DEPENDENT:
        start_dependents(True)
    else:
        tl.debug_barrier()


@triton.jit
def silu(x):
    """x * sigmoid(x) in float32; exp overflows to infinity for very negative x, giving -0."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def arrived_last(counter_ptr, num_blocks):
    """True in the last of num_blocks thread blocks to get here; the counter returns to zero.

    The others' stores made before their call are visible to that block, if it reads past the L1
    cache (cache_modifier=".cg"): the barrier orders all threads' stores before one thread's
    release, and its acquire before the reads (PTX memory model, causality order).
    """
    tl.debug_barrier()
    ticket = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = ticket == num_blocks - 1
    if last:
        tl.store(counter_ptr, 0)
    return last
